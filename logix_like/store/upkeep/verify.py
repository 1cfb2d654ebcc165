"""Reading every byte of a store that counts, and naming what is not as it was committed.

Checked are the manifest, every Zarr document, the commit records, each committed chunk of every array (against
its own checksum and the record's), the latest statistics, projections, checkpoints, retractions, recorded paths,
curvatures and sample views. Files that no record names (what a kill left, temporary names) hold no committed rows and
are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from os import PathLike

import numpy as np

from logix_like.errors import StoreDamagedError, StoreError, StoreNotFoundError, StoreVersionError
from logix_like.layout import DataId
from logix_like.store.format.arrays import chunk_file, read_chunk
from logix_like.store.format.attempts import parse_writer_name, standing_parts
from logix_like.store.format.checkpoints import check_record, check_weights, checkpoint_records
from logix_like.store.format.columns import decode_ids, decode_texts
from logix_like.store.format.commits import CommitReader, Commits, RowsRecord, read_commits
from logix_like.store.format.creation import read_matrix
from logix_like.store.format.damage import array_file, unrecorded_files, written_chunks
from logix_like.store.format.documents import unsealed
from logix_like.store.format.journal import journals, read_journal
from logix_like.store.format.retractions import read_retraction, retraction_files
from logix_like.store.format.schema import (
    COLUMNS,
    COMMITS,
    DATA_ID,
    DOCUMENT,
    MEAN_VIEWS,
    METADATA,
    PROJECTIONS,
    QUARANTINE,
    STATISTICS_FOLDER,
    TAILS,
    WRITER_COLUMNS,
    WRITERS,
    Flag,
    StoreManifest,
    read_manifest,
    segment,
)
from logix_like.store.format.sums import load_latest_statistics
from logix_like.store.format.tensors import check_tensors, tensor_files
from logix_like.store.places.files import Place, as_place, names_in, reached, read_bytes, walk

Progress = Callable[[int, int], None]
"""Told of each step: how many there were, and how many there are to be."""


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was committed, or could not be read."""

    file: Place
    """The file, or the folder of statistics."""
    finding: str
    """What is wrong, in words."""
    rows: tuple[int, int] | None = None
    """First row of the store (in its reader's order) that the file holds, and the one behind the last."""
    data_id: tuple[DataId, ...] | None = None
    """Ids of these rows; None where they cannot be read either."""
    known: bool = True
    """Whether the bytes were read; else it is not known that they are damaged."""

    def __str__(self) -> str:
        return self.finding if self.data_id is None else f"{self.finding} (data ids: {_listed(self.data_id)})"


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found."""

    path: Place
    """The store."""
    rows: int
    """Committed rows, damaged or not."""
    files: int
    """How many things were checked."""
    damages: tuple[Damage, ...]
    """What is damaged, in the order in which it was found."""

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was committed."""
        return not self.damages

    def __str__(self) -> str:
        if self.ok:
            return f"{self.path}: {self.rows:,} rows, {self.files:,} files checked, all as they were committed"
        head = f"{self.path}: {len(self.damages):,} of {self.files:,} files checked are damaged"
        return "\n".join([head, *(f"  {damage}" for damage in self.damages)])


@dataclass(frozen=True)
class _Check:
    """One thing to read."""

    file: Place
    read: Callable[[], object]
    ids: Callable[[], tuple[DataId, ...] | None] = lambda: None
    rows: tuple[int, int] | None = None


def verify(path: str | PathLike[str] | Place, progress: Progress | None = None) -> VerifyReport:
    """Read all of the store at ``path``; nothing is written, and nothing that is found is raised.

    Of a live store what was committed at the beginning is checked. Where parts or views came or went meanwhile (a
    merge), files that are missing are no finding yet: all is read again.

    Raises :class:`StoreNotFoundError` and :class:`StoreVersionError` where there is no store to check.
    """
    store = as_place(path)
    with reached(store):
        while True:
            known = _parts_and_views(store)
            report = _read_all(store, progress)
            if report.ok or _parts_and_views(store) == known:
                return report


def _parts_and_views(store: Place) -> list[list[str]]:
    parts = [name for name in names_in(store / WRITERS) if parse_writer_name(name) is not None]
    return [parts, [name for name in names_in(store / MEAN_VIEWS) if not name.startswith(".")]]


def _read_all(store: Place, progress: Progress | None) -> VerifyReport:
    damages: list[Damage] = []
    manifest = _attempt(_Check(store / DOCUMENT, lambda: read_manifest(store)), damages)
    checks = list(_documents(store))
    rows = 0
    if isinstance(manifest, StoreManifest):
        rows, more = _contents(store, manifest, damages)
        checks += more
    for number, check in enumerate(checks):
        _attempt(check, damages)
        if progress is not None:
            progress(number + 1, len(checks))
    return VerifyReport(store, rows, len(checks) + 1, tuple(_once(damages)))


def _attempt(check: _Check, damages: list[Damage]) -> object:
    try:
        with reached(check.file):
            return check.read()
    except (StoreNotFoundError, StoreVersionError):
        raise
    except (StoreError, OSError, ValueError) as error:
        finding = str(error) if str(check.file) in str(error) else f"{check.file}: {error}"
        known = not isinstance(error, StoreError) or isinstance(error, StoreDamagedError)
        damages.append(Damage(check.file, finding, check.rows, check.ids(), known))
        return None


def _once(damages: list[Damage]) -> Iterator[Damage]:
    seen: set[Place] = set()
    for damage in damages:
        if damage.file not in seen:
            seen.add(damage.file)
            yield damage


def _documents(store: Place) -> Iterator[_Check]:
    inside = len(str(store))
    for file, _ in walk(store):
        # Hidden names are unfinished.
        within = str(file)[inside:]
        if file.name == DOCUMENT and "/." not in within and not within.startswith(f"/{QUARANTINE}/"):
            yield _Check(file, partial(_unsealed_if_there, file))


def _unsealed_if_there(file: Place) -> object:
    """A document that was there when the store was listed; those that there must be are asked for by name."""
    try:
        return unsealed(read_bytes(file))
    except FileNotFoundError:
        return None


def _contents(store: Place, manifest: StoreManifest, damages: list[Damage]) -> tuple[int, list[_Check]]:
    checks = [
        _document(store / WRITERS),
        *([] if manifest.layout is None else [_document(store / PROJECTIONS)]),
        *_projections(store, manifest),
        *_checkpoints(store),
        *(_Check(file, partial(read_retraction, file)) for file in retraction_files(store)),
        *(_Check(file, partial(read_journal, file)) for file in journals(store)),
        *(_Check(file, partial(check_tensors, file)) for file in tensor_files(store)),
    ]
    rows = 0
    for name in _standing(store):
        folder = store / WRITERS / name
        commits = _record(folder, damages)
        if commits.rows:  # a writer may have been killed as it began
            checks.append(_document(folder))
        checks += [*_part(folder, commits, rows, manifest), *_statistics(folder, commits, manifest)]
        rows += commits.total
    for folder in _inside(store / MEAN_VIEWS):
        checks += [_document(folder), *_part(folder, _record(folder, damages), 0, manifest, view=True)]
    return rows, checks


def _projections(store: Place, manifest: StoreManifest) -> Iterator[_Check]:
    for side, shapes in manifest.projection_shapes.items():
        for module, shape in shapes.items():
            if shape is not None:
                folder = store / PROJECTIONS / segment(module) / side
                yield _Check(chunk_file(folder, 0, 2), partial(read_matrix, store, module, side, shape))


def _standing(store: Place) -> list[str]:
    """Names of the parts that are read; all of them where a merged one's record is damaged."""
    folder = store / WRITERS
    found = _attempt(_Check(folder, lambda: standing_parts(folder, CommitReader())), [])
    return found if isinstance(found, list) else [name for name in names_in(folder) if parse_writer_name(name)]


def _document(folder: Place) -> _Check:
    """The Zarr document that a folder must have."""
    file = folder / DOCUMENT
    return _Check(file, lambda: unsealed(read_bytes(file)))


def _inside(parent: Place) -> list[Place]:
    return [parent / name for name in names_in(parent) if not name.startswith(".")]


def _record(folder: Place, damages: list[Damage]) -> Commits:
    file = folder / COMMITS
    written = written_chunks(folder)
    commits = _attempt(_Check(file, lambda: read_commits(folder)), damages)
    if not isinstance(commits, Commits):
        return Commits()
    if commits.spoilt:
        damages.append(
            Damage(file, f"{file}: its last record is whole and does not match its checksum; it is left out")
        )
    lost = unrecorded_files(folder, written, commits)
    if lost:
        finding = f"names none of {len(lost)} chunks that were written (the first is {lost[0]}): lines of it are gone"
        damages.append(Damage(file, f"{file} {finding}"))
    return commits


def _part(
    folder: Place, commits: Commits, first: int, manifest: StoreManifest, *, view: bool = False
) -> Iterator[_Check]:
    """Every chunk of every array, and the documents that there must be."""
    for record in commits.rows:
        rows = (first, first + record.rows)
        first = rows[1]
        part = record.within(folder)
        for array, crc in record.crc.items():
            file = array_file(folder, record, array)
            what = f"{array} of rows {rows[0]} to {rows[1] - 1}" + (" of a sample view" if view else "")
            yield _Check(
                file,
                partial(read_chunk, file, what, crc=crc),
                partial(_ids, part, record),
                None if view else rows,
            )
            yield _document(part / array)
        if record.part:
            yield from (_document(part), _document(folder / TAILS))
        if any(array.startswith(METADATA) for array in record.crc):
            yield _document(part / METADATA)


def _ids(part: Place, record: RowsRecord) -> tuple[DataId, ...] | None:
    """The ids of a chunk's rows, or None where they are damaged themselves."""
    try:
        texts = read_chunk(chunk_file(part / DATA_ID, record.chunk, 1), "ids", crc=record.crc[DATA_ID])
        numbers = read_chunk(chunk_file(part / COLUMNS, record.chunk, 2), "flags", crc=record.crc[COLUMNS])
        flags = numbers.view("<f8").reshape(record.rows, -1)[:, WRITER_COLUMNS.index("flags")].astype(np.int64)
        ids = decode_ids(decode_texts(texts, record.rows, "ids"), (flags & int(Flag.INTEGER_ID)) != 0)
    except (StoreError, KeyError, ValueError):
        return None
    return tuple(ids.tolist())


def _statistics(folder: Place, commits: Commits, manifest: StoreManifest) -> Iterator[_Check]:
    record, layout = commits.statistics, manifest.layout
    if record is not None and layout is not None:
        where = folder / STATISTICS_FOLDER / str(record.generation)
        yield _Check(where, lambda: load_latest_statistics(folder, record, layout))


def _checkpoints(store: Place) -> Iterator[_Check]:
    for record in checkpoint_records(store):
        yield _Check(record, partial(check_record, record))
        weights = record.parent / f"{record.stem}.safetensors"
        yield _Check(weights, partial(check_weights, record))


def _listed(ids: tuple[DataId, ...], shown: int = 8) -> str:
    more = f", and {len(ids) - shown} more" if len(ids) > shown else ""
    return ", ".join(repr(one) for one in ids[:shown]) + more
