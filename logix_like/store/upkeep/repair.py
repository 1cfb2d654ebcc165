"""Taking out of a store what is damaged, so that all the rest can be used again; on request only.

Nothing is deleted: what was there before, damaged or replaced, is kept under ``quarantine/<n>/`` by its old
path, beside ``repair.json``, which says what was done and which rows are gone. Rows are rolled back commit by
commit: a damaged chunk takes its own commit with it and no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from os import PathLike

from logix_like.errors import StoreError
from logix_like.layout import Layout
from logix_like.store.encoding.codecs import CODECS, UNCOMPRESSED
from logix_like.store.encoding.kinds import ENCODINGS
from logix_like.store.format.arrays import write_group
from logix_like.store.format.attempts import MERGED_RANK, parse_writer_name
from logix_like.store.format.checkpoints import damaged_checkpoints
from logix_like.store.format.commits import (
    CloseRecord,
    GoneRecord,
    Record,
    RowsRecord,
    StatisticsRecord,
    format_record,
    read_commits,
    salvage_records,
)
from logix_like.store.format.creation import write_projection_documents
from logix_like.store.format.damage import array_file, damaged_files, unrecorded_files, written_chunks
from logix_like.store.format.parts import PartWriter
from logix_like.store.format.schema import (
    CHECKPOINTS,
    COMMITS,
    CURVATURE,
    DOCUMENT,
    JOURNAL,
    MEAN_VIEWS,
    PROJECTIONS,
    QUARANTINE,
    STATISTICS_FOLDER,
    TAILS,
    WRITER_COLUMNS,
    WRITERS,
    StoreManifest,
    read_manifest,
)
from logix_like.store.format.sums import load_statistics
from logix_like.store.places.files import (
    Place,
    as_place,
    exists,
    files_of,
    named_errors,
    names_in,
    read_bytes,
    walk,
    write_file,
)
from logix_like.store.upkeep.verify import Damage, Progress, VerifyReport, verify

REPORT = "repair.json"


@dataclass(frozen=True)
class RepairReport:
    """What :func:`repair` did."""

    path: Place
    """The store."""
    found: tuple[Damage, ...]
    """What was damaged."""
    done: tuple[str, ...]
    """What was done about it, a line for each act."""
    rows: int
    """Rows of the commits that were taken out; a line of a record that cannot be read does not tell how many."""
    quarantine: Place | None
    """Where everything that was taken out lies; None where nothing had to be."""
    after: VerifyReport
    """The store as it is now."""

    @property
    def ok(self) -> bool:
        """Whether nothing damaged is left."""
        return self.after.ok

    def __str__(self) -> str:
        if not self.found:
            return f"{self.path}: nothing is damaged, nothing was done"
        lines = [f"{self.path}: {self.rows:,} rows taken out; what was there is kept in {self.quarantine}"]
        lines += [f"  {line}" for line in self.done]
        return "\n".join([*lines, str(self.after)])


def repair(path: str | PathLike[str] | Place, progress: Progress | None = None) -> RepairReport:
    """Take what is damaged out of the store at ``path``; ``progress`` is told of the reading before and after.

    Afterwards the store opens, answers queries and verifies clean, but for what nothing in the store can replace: a
    damaged projection, or a damaged retraction (without which rows that were taken back would count again). Those
    are named and left.

    Raises:
        StoreError: A process writes to the store, or a file could not be read for another reason than damage.
        StoreDamagedError: The manifest is damaged, so that it cannot be told what the store is.
        StoreWriteError: The storage takes nothing more; the next repair goes on.
    """
    store = as_place(path)
    manifest = read_manifest(store)
    before = verify(store, progress)
    if before.ok:
        return RepairReport(store, (), (), 0, None, before)
    if unknown := [damage for damage in before.damages if not damage.known]:
        raise StoreError(f"nothing was repaired, since not all could be read: {unknown[0].finding}")
    with ExitStack() as locks:
        for rank in sorted({0, *(rank for _, rank in _writers(store))} - {MERGED_RANK}):
            locks.callback(files_of(store).lock(store, store / WRITERS, rank).close)
        with named_errors(store):
            work = _Repair(store, manifest)
            work.run(before.damages)
    after = verify(store, progress)
    return RepairReport(store, before.damages, tuple(work.done), work.rows, work.quarantine, after)


class _Repair:
    """One repair: where things are moved to, and what was done."""

    def __init__(self, store: Place, manifest: StoreManifest) -> None:
        self._store = store
        self._manifest = manifest
        self.quarantine = _new_folder(store / QUARANTINE)
        self.done: list[str] = []
        self.rows = 0

    def run(self, damages: tuple[Damage, ...]) -> None:
        """Work through what is damaged; the report is written first and again at the end."""
        self._record(damages)
        places = [self._within(damage.file) for damage in damages]
        documents = [damage.file for damage in damages if damage.file.name == DOCUMENT]
        for place in places:
            if place[0] == JOURNAL:
                self._aside(self._at(place), "a recorded path, which can be replayed no more")
            if place[0] == CURVATURE:
                self._aside(self._at(place), "a curvature, which can be fitted again, or the sums of a fit")
        for name in sorted({place[1] for place in places if place[0] == WRITERS and len(place) > 2}):
            folder = self._store / WRITERS / name
            self._writer(folder, [file for file in documents if str(file).startswith(f"{folder}/")])
        views = tuple(MEAN_VIEWS.split("/"))
        for name in sorted({place[2] for place in places if place[:2] == views and len(place) > 3}):
            self._aside(self._store / MEAN_VIEWS / name, "a sample view, which is made anew when it is asked for")
        if any(place[0] == CHECKPOINTS for place in places):
            self._checkpoints()
        for place in places:
            self._group(place)
        self._record(damages)

    def _writer(self, folder: Place, documents: list[Place]) -> None:
        """Keep the commits of a part whose files are all as they were committed, and no other."""
        if not exists(folder / COMMITS):
            self._aside(folder, "rows without a record of what was committed")
            self._claim(folder)  # never a name again: retractions name parts
            return
        records, unreadable = salvage_records(folder)
        rows = [record for record in records if isinstance(record, RowsRecord)]
        left_out = [record for record in rows if self._is_damaged(folder, record)]
        self.rows += sum(record.rows for record in left_out)
        whole = [record for record in rows if record not in left_out]
        kept = _with_statistics(records, left_out, self._statistics(folder, records))
        self.done += [f"{folder / COMMITS}: {finding}: left out" for finding in unreadable]
        files, lines = files_of(folder), [format_record(record) for record in kept]
        if files.read_records(folder / COMMITS) != b"".join(line + b"\n" for line in lines):
            self._copy(folder / COMMITS)
            files.replace_records(folder / COMMITS, lines)
        for record in left_out:  # only now: until the record is written anew, the store is as it was
            for array in record.crc:
                self._move(array_file(folder, record, array))
        for file in unrecorded_files(folder, written_chunks(folder), read_commits(folder)):
            self._aside(file, "a chunk that the record does not name")
        for file in documents:
            self._copy(file)
        self._documents(folder, whole)

    def _is_damaged(self, folder: Place, record: RowsRecord) -> bool:
        found = list(damaged_files(folder, record, record.start))
        for error in found:
            self.done.append(f"{_finding(error)}: the commit of its {record.rows:,} rows is left out")
        return bool(found)

    def _statistics(self, folder: Place, records: list[Record]) -> StatisticsRecord | None:
        """The record of the latest statistics that can be read, also of some whose own record is gone."""
        generations = [record.generation for record in records if isinstance(record, StatisticsRecord)][-1:]
        present = [int(name) for name in names_in(folder / STATISTICS_FOLDER) if name.isdecimal()]
        for generation in dict.fromkeys([*generations, *sorted(present, reverse=True)]):
            where = folder / STATISTICS_FOLDER / str(generation)
            try:
                rows = load_statistics(where, self._manifest.layout or Layout(()), None).statistics.rows
            except (StoreError, OSError, ValueError) as error:
                self.done.append(
                    f"{_finding(error)}: left out; sums over rows are computed again when a query needs them, "
                    "Kronecker factors are lost"
                )
                self._move(where)
            else:
                return StatisticsRecord(0, generation, rows)
        return None

    def _documents(self, folder: Place, records: list[RowsRecord]) -> None:
        """Write a part's Zarr documents anew: the record says what is in them."""
        manifest = self._manifest
        encoding = ENCODINGS.get(manifest.encoding or "")
        if manifest.layout is None or encoding is None:
            return
        for part in dict.fromkeys(record.part for record in records):
            where = folder / part if part else folder
            own = [record for record in records if record.part == part]
            arrays = PartWriter(
                where,
                manifest.layout,
                encoding,
                chunk_rows=own[0].rows,
                column_names=WRITER_COLUMNS,
                codec=CODECS.get(own[0].codec, UNCOMPRESSED),
            )
            arrays.restore_documents(max(one.start + one.rows for one in own), own[0].crc)
        self._claim(folder)

    def _claim(self, folder: Place) -> None:
        attempt, rank = parse_writer_name(folder.name) or (0, 0)
        replaced = read_commits(folder).replaces
        write_group(folder, {"replaces": replaced} if replaced else {"rank": rank, "attempt": attempt})

    def _checkpoints(self) -> None:
        for number in damaged_checkpoints(self._store):
            for name in (f"{number}.json", f"{number}.safetensors"):
                self._aside(self._store / CHECKPOINTS / name, f"checkpoint {number}")

    def _group(self, place: tuple[str, ...]) -> None:
        """Write the document of a group or of a projection anew, whose content does not depend on it."""
        file = self._at(place)
        if place[-1] != DOCUMENT or len(place) == 1 or not exists(file.parent):
            return
        self._copy(file)
        if place[0] == PROJECTIONS and len(place) == 4:
            write_projection_documents(self._store, self._manifest)
        elif place[0] != WRITERS or len(place) == 2 or place[-2] in (TAILS, STATISTICS_FOLDER) or place[-3] == TAILS:
            write_group(file.parent)
        self.done.append(f"{file}: written anew")

    def _aside(self, what: Place, meaning: str) -> None:
        if exists(what):
            self._move(what)
            self.done.append(f"{what}: moved to quarantine: {meaning}")

    def _move(self, what: Place) -> None:
        if exists(what):
            files_of(what).move(what, self._kept(what))

    def _copy(self, what: Place) -> None:
        """Keep a file, or the objects of a record, as it is now; what is kept already stays."""
        for file in [file for file, _ in walk(what)] or [what]:
            target = self._kept(file)
            if exists(file) and not exists(target):
                write_file(target, [read_bytes(file)], sync=True)

    def _kept(self, what: Place) -> Place:
        return self.quarantine / "/".join(self._within(what))

    def _within(self, what: Place) -> tuple[str, ...]:
        """The parts of a place's path below the store."""
        return tuple(str(what).removeprefix(f"{self._store}/").split("/"))

    def _at(self, place: tuple[str, ...]) -> Place:
        return self._store / "/".join(place)

    def _record(self, damages: tuple[Damage, ...]) -> None:
        told = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "found": [
                {
                    "file": str(damage.file),
                    "finding": damage.finding,
                    "rows": damage.rows,
                    "data_id": damage.data_id,
                }
                for damage in damages
            ],
            "done": self.done,
        }
        write_file(self.quarantine / REPORT, [json.dumps(told, indent=1).encode()], sync=True)


def _finding(error: BaseException) -> str:
    """What was found, without the advice to restore it."""
    return str(error).partition(";")[0]


def _with_statistics(
    records: list[Record], left_out: list[RowsRecord], statistics: StatisticsRecord | None
) -> list[Record]:
    """The record to write: what is taken out keeps its number, since retractions name commits by theirs."""
    named = [one for one in records if isinstance(one, StatisticsRecord)]
    kept: list[Record] = [
        GoneRecord(one.sequence) if one in left_out or (statistics is None and one in named) else one for one in records
    ]
    if statistics is None or (named and _told(named[-1]) == _told(statistics)):
        return kept
    close = [one for one in kept if isinstance(one, CloseRecord)]
    kept = [one for one in kept if not isinstance(one, CloseRecord)]
    kept.append(replace(statistics, sequence=len(kept)))
    return [*kept, *(CloseRecord(len(kept)) for _ in close)]


def _told(record: StatisticsRecord) -> tuple[int, int]:
    return record.generation, record.watermark


def _writers(store: Place) -> Iterator[tuple[int, int]]:
    """``(attempt, rank)`` of each part."""
    yield from (name for name in map(parse_writer_name, names_in(store / WRITERS)) if name is not None)


def _new_folder(parent: Place) -> Place:
    numbers = [int(name) for name in names_in(parent) if name.isdecimal()]
    folder = parent / str(1 + max(numbers, default=0))
    files_of(folder).make_folder(folder, sync=True)
    return folder
