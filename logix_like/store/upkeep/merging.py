"""Putting all parts of a store into one: whole chunks in place of many short ones, without rows taken back.

The new part is written, read back and compared with the old rows bit by bit, while no reader takes notice of it. Then
its record is closed: that one line (in an object store one object, which is created on the condition that there is
none) puts it in the place of the old parts, so that there is no instant at which a reader sees rows twice or not at
all. Only then the old parts are removed. What a kill leaves behind, an unfinished part or replaced ones, no reader
sees; the next merge removes it. All this is said of this library's readers: other tools that read the Zarr groups know
no records, and while a merge runs (or after one was killed) they see its part beside those that it is to replace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from logix_like.errors import StoreError
from logix_like.statistics import ROW_SUMS, Statistics, StatisticsAccumulator
from logix_like.store.encoding.base import StoredRows
from logix_like.store.encoding.codecs import UNCOMPRESSED, codec_named
from logix_like.store.format.arrays import write_group
from logix_like.store.format.attempts import MERGED, MERGED_RANK, parse_writer_name
from logix_like.store.format.columns import id_text, value_text
from logix_like.store.format.commits import read_commits
from logix_like.store.format.parts import EncodedRows
from logix_like.store.format.retractions import read_retractions
from logix_like.store.format.schema import (
    DATA_ID,
    MEAN_VIEWS,
    METADATA,
    STATISTICS_FOLDER,
    WRITER_COLUMNS,
    WRITERS,
    Flag,
    segment,
)
from logix_like.store.format.sums import save_statistics
from logix_like.store.places.files import Place, as_place, files_of, folder_size, named_errors, names_in, remove_tree
from logix_like.store.reading.gradients import RowChunk
from logix_like.store.reading.reader import GradientStore, build_view
from logix_like.store.reading.table import PartSource, RowTable, make_table
from logix_like.store.writing.pipeline import chunk_rows
from logix_like.store.writing.rowwriter import RowWriter
from logix_like.timing import NOTHING

Progress = Callable[[int, int], None]
"""Told of each step: rows done, and rows to be done (each is written and read back)."""


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_parts` did."""

    path: Place
    """The store."""
    rows: int
    """Rows now."""
    dropped: int
    """Rows that had been taken back and are on the disk no more."""
    parts: tuple[int, int]
    """Parts before and after."""
    chunks: tuple[int, int]
    """Chunks of rows before and after."""
    bytes: tuple[int, int]
    """Bytes of all parts before and after."""

    def __str__(self) -> str:
        told = (
            f"{what} {before:,} -> {after:,}"
            for what, (before, after) in (("parts", self.parts), ("chunks", self.chunks), ("bytes", self.bytes))
        )
        return f"{self.path}: {self.rows:,} rows, {self.dropped:,} taken back were dropped; {', '.join(told)}"


def merge_parts(path: str | PathLike[str] | Place, progress: Progress | None = None) -> MergeReport:
    """Merge all parts of the store at ``path``; rows keep their order and every bit.

    Takes as much room on the disk as the rows do, for as long as it runs. Readers that were opened before must
    ``refresh()``. Rows of one chunk whose coordinates have a scale of their own (int8, int4, sign) stay a chunk.

    Raises:
        StoreError: A process writes to the store, or takes rows back at the same moment.
        StoreDamagedError: A row cannot be read; nothing was changed.
        StoreWriteError: The storage takes nothing more; the store is as it was.
    """
    store = as_place(path)
    with ExitStack() as locks, named_errors(store):
        present = names_in(store / WRITERS)
        names = [name for name in map(parse_writer_name, present) if name is not None]
        held = {rank for _, rank in names if rank != MERGED_RANK} | {0}
        _lock(store, held, locks)
        opened = GradientStore(store)
        # A rank that began meanwhile holds its own lock, and this says so; one that begins from here on is let be.
        _lock(store, {writer.rank for writer in opened.writers} - held - {MERGED_RANK}, locks)
        _remove_leftovers(store, present, opened)
        before = folder_size(store / WRITERS)
        source, kept = opened.table, np.flatnonzero((opened.flags & int(Flag.SUPERSEDED)) == 0)
        if not _is_merged(opened, len(kept)):
            attempt = 1 + max((attempt for attempt, _ in names), default=0)
            _replace(opened, kept, f"{MERGED}-{attempt}", progress)
            opened = GradientStore(store)
        if names_in(store / MEAN_VIEWS):
            build_view(store)
    counts = (len(source.segments), len(opened.table.segments))
    return MergeReport(
        store,
        len(opened),
        len(source) - len(kept),
        (sum(name is not None for name in names), len(opened.writers)),
        counts,
        (before, folder_size(store / WRITERS)),
    )


def _lock(store: Place, ranks: set[int], locks: ExitStack) -> None:
    for rank in sorted(ranks):
        locks.callback(files_of(store).lock(store, store / WRITERS, rank).close)


def _is_merged(store: GradientStore, rows: int) -> bool:
    """Whether there is nothing to gain: one closed part, at most one short chunk, no row taken back."""
    short = sum(bool(record.part) for writer in store.writers for record in writer.commits.rows)
    one = len(store.writers) == 1 and store.writers[0].commits.closed
    return not store.writers or (one and short <= 1 and rows == len(store))


def _replace(store: GradientStore, kept: np.ndarray, name: str, progress: Progress | None) -> None:
    writers = store.path / WRITERS
    folder = writers / name
    told = progress or (lambda done, of: None)
    old = [writer.name for writer in store.writers]
    write_group(folder, {"replaces": old}, sync=True)
    out = _row_writer(store, folder)
    try:
        _require_known_retractions(store)
        _write(store, kept, out, old, lambda rows: told(rows, 2 * len(kept)))
        _require_equal(store.table, kept, folder, lambda rows: told(len(kept) + rows, 2 * len(kept)))
        out.seal()
    except Exception:
        remove_tree(folder)
        raise
    finally:
        out.abandon()
    for one in old:
        remove_tree(writers / one)


def _require_known_retractions(store: GradientStore) -> None:
    """Refuse rows that were taken back since the store was opened; from here on what takes back names the new part."""
    if read_retractions(store.path) != store.retractions:
        raise StoreError(
            f"rows of {store.path} were taken back while its merge began; nothing was changed: run it again"
        )


def _remove_leftovers(store: Place, present: list[str], opened: GradientStore) -> None:
    """Remove what an earlier merge that was killed left of what was ``present`` before the store was opened."""
    standing = {writer.name for writer in opened.writers}
    for name in present:
        if name.endswith(".partial") or (parse_writer_name(name) is not None and name not in standing):
            remove_tree(store / WRITERS / name)


def _row_writer(store: GradientStore, folder: Place) -> RowWriter:
    table = store.table
    codec = codec_named(table.segments[-1].codec) if table.segments else UNCOMPRESSED
    rows, names = chunk_rows(table.layout, table.encoding, _chunk_mib(store)), WRITER_COLUMNS
    return RowWriter(folder, table.layout, table.encoding, chunk_rows=rows, column_names=names, codec=codec, sync=True)


def _write(store: GradientStore, kept: np.ndarray, out: RowWriter, old: list[str], told: Callable[[int], None]) -> None:
    table = store.table
    out.record_replaced(old)
    cursor = max((writer.cursor for writer in store.writers), key=lambda one: one[1], default=(-1, -1))
    for start, stored in _chunks(table, kept, out.chunk_rows):
        numbers = kept[start : start + len(stored)]
        last = start + len(stored) == len(kept)
        timing = store.timing if last else NOTHING
        epoch, step = cursor if last else (int(table.epoch[numbers[-1]]), int(table.step[numbers[-1]]))
        out.write(_encoded(table, numbers, stored), epoch=epoch, step=step, timing=timing)
        told(start + len(stored))
    statistics = _statistics(store, kept)
    if statistics.rows:
        save_statistics(out.folder / STATISTICS_FOLDER / "1", statistics, sync=True)
        write_group(out.folder / STATISTICS_FOLDER, sync=True)
        out.record_statistics(1, statistics.rows)


def _statistics(store: GradientStore, kept: np.ndarray) -> Statistics:
    """The statistics of the rows ``kept``, as far as some were gathered.

    Where these cover other rows, sums over rows are taken anew. Kronecker factors cannot be: they go on telling how
    many of their rows were taken back.
    """
    gathered, layout = store.statistics, store.table.layout
    if gathered.rows == len(store) and not gathered.stale:
        return gathered.over(len(kept))
    covariances = [block.size for block in layout if gathered.has(block.name, "outer_sum")]
    names = [
        name
        for name, fields in ROW_SUMS.items()
        if fields and any(all(gathered.has(block.name, field) for field in fields) for block in layout)
    ]
    accumulator = StatisticsAccumulator(layout, names, covariance_limit=max(covariances, default=0))
    valid = store.valid[kept]
    for piece in store.table.gradients.selected(kept):
        accumulator.update(piece.decode()[torch.from_numpy(valid[piece.start : piece.stop])], covered=len(piece))
    return gathered.with_row_sums(accumulator.snapshot(), len(kept))


def _chunk_mib(store: GradientStore) -> float:
    settings = store.manifest.config.get("store")
    chosen = settings.get("chunk_mib") if isinstance(settings, dict) else None
    return float(chosen) if isinstance(chosen, int | float) and 0 < chosen < 1024 else 4.0


def _chunks(table: RowTable, kept: np.ndarray, rows: int) -> Iterator[tuple[int, StoredRows]]:
    """The rows ``kept`` as they are stored, in chunks of ``rows``; and which of them each chunk begins with."""
    waiting: list[RowChunk] = []
    for piece in table.gradients.selected(kept):
        for part in _cut(piece, waiting, rows):
            if part.coordinate_scale is not None:
                yield part.start, StoredRows(part.raw, part.scale, part.coordinate_scale)
                continue
            waiting.append(part)
            if sum(map(len, waiting)) == rows:
                yield waiting[0].start, _joined(waiting)
                waiting.clear()
    if waiting:
        yield waiting[0].start, _joined(waiting)


def _cut(piece: RowChunk, waiting: list[RowChunk], rows: int) -> Iterator[RowChunk]:
    """A piece in parts, of which none goes beyond the chunk that is being filled."""
    done = 0
    while done < len(piece):
        filled = 0 if piece.coordinate_scale is not None else sum(map(len, waiting)) % rows
        count = min(rows - filled, len(piece) - done)
        yield piece.select(np.arange(done, done + count), piece.start + done)
        done += count


def _joined(parts: list[RowChunk]) -> StoredRows:
    scale = None if parts[0].scale is None else torch.cat([one.scale for one in parts if one.scale is not None])
    return StoredRows(torch.cat([one.raw for one in parts]), scale, None)


def _encoded(table: RowTable, rows: np.ndarray, stored: StoredRows) -> EncodedRows:
    texts = {DATA_ID: [id_text(data_id)[0] for data_id in table.data_id[rows]]}
    for name, column in table.metadata.items():
        texts[f"{METADATA}/{segment(name)}"] = [value_text(value) for value in column[rows]]
    return EncodedRows(stored, table.numbers[rows], texts)


def _require_equal(source: RowTable, kept: np.ndarray, folder: Place, told: Callable[[int], None]) -> None:
    """Read the new part and compare every bit of it with the rows that it is to stand for."""
    part = PartSource(folder, folder.name, read_commits(folder))
    found = make_table([part], source.layout, source.encoding, WRITER_COLUMNS, "none")
    same = len(found) == len(kept) and found.data_id.tolist() == source.data_id[kept].tolist()
    same = same and found.numbers.tobytes() == source.numbers[kept].tobytes()
    same = same and all(found.metadata[name].tolist() == c[kept].tolist() for name, c in source.metadata.items())
    for chunk in found.chunks() if same else ():
        for piece in source.gradients.selected(kept[chunk.start : chunk.stop]):
            own = chunk.select(np.arange(piece.start, piece.stop), piece.start)
            same = same and all(
                _bits(getattr(own, name)).equal(_bits(getattr(piece, name)))
                for name in ("raw", "scale", "coordinate_scale")
            )
        told(chunk.stop)
    if not same:
        raise StoreError(f"{folder} was read back with other rows than were written; the store is as it was")


def _bits(tensor: Tensor | None) -> Tensor:
    """The bytes of a tensor: NaN is equal to itself here."""
    return torch.empty(0) if tensor is None else tensor.contiguous().flatten().view(torch.uint8)
