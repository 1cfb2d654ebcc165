"""Reading gradients: chunk files are mapped, and decoded only where asked for; a few rows of one are read alone."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logix_like.layout import Layout
from logix_like.store.encoding.codecs import CODECS
from logix_like.store.encoding.kinds import Encoding, StoredRows
from logix_like.store.format.arrays import chunk_file, chunk_name, damaged, unreadable
from logix_like.store.format.schema import COORDINATE_SCALE, GRADIENTS, SCALE
from logix_like.store.format.segments import Segment
from logix_like.store.places.files import CHECKSUM_BYTES, Place, as_bytes, checksum, file_size, map_bytes
from logix_like.store.places.hold import FolderHold
from logix_like.store.places.local import file_stamp, read_items

KEPT_BYTES = 32 * 2**20
"""Mappings of this size are kept open, so that small stores are mapped once."""

FEW = 1 / 2
"""Fewer rows of a chunk than this share are read one by one: where rows of a mapping are copied, each of its pages
costs as much as a whole row that is read."""

JOINED_BYTES = 8 * 2**20
"""Such rows come together, from several chunks, up to about this size."""

ALL = slice(None)

RowKey = int | slice | EllipsisType | Sequence[int] | Sequence[bool] | np.ndarray | Tensor


@dataclass(frozen=True)
class RowChunk:
    """Some rows of a scan, still encoded."""

    start: int
    """Number of the first row."""
    raw: Tensor
    """``[n, stored width]`` of the stored type; a view of the file where possible: never write to it."""
    scale: Tensor | None
    """``[n, modules]`` float32, where the encoding has scales."""
    encoding: Encoding
    """How the rows are stored."""
    layout: Layout
    """The rows' module table."""
    coordinate_scale: Tensor | None = None
    """``[width]`` float32, where the encoding has one for each coordinate; each chunk has its own."""

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def stop(self) -> int:
        """Number of the row behind the last one."""
        return self.start + len(self.raw)

    def decode(self, rows: slice = ALL, out: Tensor | None = None, *, in_units: bool = False) -> Tensor:
        """The rows ``[n, width]`` (some of them), float32 (float64 where they are stored so); into ``out`` if given.

        ``in_units`` leaves each coordinate in units of ``coordinate_scale``, where there is one.
        """
        return self.encoding.decode(self._stored.select(rows), self.layout, out, in_units=in_units)

    def codes(self) -> Tensor:
        """The numbers that the scales multiply, ``[n, width]``: int8, unpacked, for ``int8``, ``int4`` and ``sign``.

        ``decode()`` is ``codes() * scale`` of the row and module ``* coordinate_scale`` of the coordinate.
        """
        return self.encoding.codes(self._stored, self.layout)

    def select(self, rows: np.ndarray, start: int) -> RowChunk:
        """Rows by their numbers within the chunk, as a chunk that begins at ``start``."""
        where: Any = torch.from_numpy(rows)
        if np.all(np.diff(rows) == 1):
            where = slice(int(rows[0]), int(rows[-1]) + 1)  # a run of rows needs no copy
        stored = self._stored.select(where)
        return RowChunk(start, stored.values, stored.scale, self.encoding, self.layout, self.coordinate_scale)

    @property
    def _stored(self) -> StoredRows:
        return StoredRows(self.raw, self.scale, self.coordinate_scale)


@dataclass(frozen=True)
class _Run:
    """Some wanted rows of one chunk."""

    segment: int
    """Number of the chunk."""
    rows: np.ndarray
    """Ascending numbers within the chunk."""
    start: int
    """Where the first stands among all wanted rows."""


class GradientReader:
    """The gradients of a table: ``reader[a:b]``, ``reader[[3, 1]]``, ``reader[mask]``, ``reader[7]``."""

    def __init__(
        self, segments: Sequence[Segment], layout: Layout, encoding: Encoding, hold: FolderHold | None = None
    ) -> None:
        self._segments = tuple(segments)
        self._hold = hold
        self._layout = layout
        self._encoding = encoding
        self._starts = np.array([segment.first for segment in self._segments], dtype=np.int64)
        self._kept: OrderedDict[int, RowChunk] = OrderedDict()
        self._kept_bytes = 0
        self._checked: dict[int, Hashable] = {}
        """By chunk the stamp of the file whose checksum was compared; an object is compared each time."""
        self._lock = threading.Lock()
        self.rows = self._segments[-1].stop if self._segments else 0
        """Number of rows."""

    def __len__(self) -> int:
        return self.rows

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, width)``."""
        return self.rows, self._layout.width

    @property
    def mapped(self) -> bool:
        """Whether chunks are mapped files; else each is read, and decompressed, when it comes."""
        return all(map(is_mapped, self._segments))

    def __getitem__(self, key: RowKey) -> Tensor:
        """Decoded rows ``[n, width]``, or one row ``[width]`` for a single number."""
        wanted = row_numbers(key, self.rows)
        order = np.argsort(wanted, kind="stable")
        result = torch.empty(0, self._layout.width, dtype=self._encoding.staging)
        for chunk in self.selected(wanted[order]):
            if not len(result):  # now: the first chunk refuses an absurd width
                result = result.new_empty(len(wanted), self._layout.width)
            chunk.decode(out=result[chunk.start : chunk.stop])
        if isinstance(key, int | np.integer):
            return result[0]
        return result if np.all(np.diff(order) == 1) else result[torch.from_numpy(np.argsort(order))]

    def chunks(self) -> Iterator[RowChunk]:
        """All rows in order, chunk by chunk."""
        for number in range(len(self._segments)):
            yield self._map(number)

    def selected(self, rows: np.ndarray) -> Iterator[RowChunk]:
        """The rows of these ascending numbers (repeats allowed), by chunk; ``start`` counts within them.

        Rows that are few in their chunks come together, from several chunks.
        """
        few: list[_Run] = []
        for run in self._runs(rows):
            single = self._reads_singly(run)
            if few and not (single and run.start - few[0].start < self._joined):
                yield self._read(few)
                few = []
            if single:
                few.append(run)
            else:
                yield self._map(run.segment).select(run.rows, run.start)
        if few:
            yield self._read(few)

    def _runs(self, rows: np.ndarray) -> Iterator[_Run]:
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        edges = np.flatnonzero(np.diff(owners)) + 1
        begin = 0
        for end in (*edges.tolist(), len(rows)):
            if begin < end:
                owner = int(owners[begin])
                yield _Run(owner, rows[begin:end] - self._starts[owner], begin)
            begin = end

    def _reads_singly(self, run: _Run) -> bool:
        """Whether rows are read one by one: from a chunk that was checked before and is not at hand anyway."""
        segment = self._segments[run.segment]
        if run.segment in self._kept or not is_mapped(segment) or len(run.rows) >= FEW * segment.rows:
            return False
        return run.segment in self._checked and self._checked[run.segment] == _stamp(segment)

    @property
    def _joined(self) -> int:
        """So many rows of several chunks come together; where coordinates have scales, each chunk has its own."""
        return 0 if self._encoding.coordinate_scaled else JOINED_BYTES // self._encoding.row_bytes(self._layout)

    def _read(self, runs: Sequence[_Run]) -> RowChunk:
        """The rows of some runs, read one by one."""
        encoding, layout = self._encoding, self._layout
        count = sum(len(run.rows) for run in runs)
        raw = torch.empty(count, encoding.stored_width(layout.width), dtype=encoding.dtype)
        scale = torch.empty(count, len(layout)) if encoding.scaled else None
        coordinate = torch.empty(layout.width) if encoding.coordinate_scaled else None
        self._read_rows(GRADIENTS, runs, raw)
        if scale is not None:
            self._read_rows(SCALE, runs, scale)
        if coordinate is not None:
            self._read_rows(COORDINATE_SCALE, [_Run(runs[0].segment, np.zeros(1, dtype=np.int64), 0)], coordinate)
        return RowChunk(runs[0].start, raw, scale, encoding, layout, coordinate)

    def _read_rows(self, array: str, runs: Sequence[_Run], into: Tensor) -> None:
        content = as_bytes(into)
        size, start = len(content) // sum(len(run.rows) for run in runs), 0
        for run in runs:
            segment, stop = self._segments[run.segment], start + size * len(run.rows)
            file = _file(segment, array)
            try:
                read_items(file, run.rows, content[start:stop])
            except OSError as error:
                raise unreadable(Path(file), str(segment), error) from error
            start = stop

    def _map(self, number: int) -> RowChunk:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            segment = self._segments[number]
            stamp = _stamp(segment)
            chunk = self._open(segment, check=stamp is None or self._checked.get(number) != stamp)
            self._checked[number] = stamp
            self._kept[number] = chunk
            self._kept_bytes += chunk.raw.nbytes
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                self._kept_bytes -= self._kept.popitem(last=False)[1].raw.nbytes
            return chunk

    def _open(self, segment: Segment, *, check: bool) -> RowChunk:
        """Map a chunk; ``check`` compares it with the checksum that was committed."""
        encoding, layout, rows = self._encoding, self._layout, segment.rows
        shape = rows, encoding.stored_width(layout.width)
        raw = _mapped(segment, GRADIENTS, encoding.dtype, shape, codec=segment.codec, check=check)
        scale = coordinate = None
        if encoding.scaled:
            scale = _mapped(segment, SCALE, torch.float32, (rows, len(layout)), check=check)
        if encoding.coordinate_scaled:
            coordinate = _mapped(segment, COORDINATE_SCALE, torch.float32, (1, layout.width), check=check)[0]
        return RowChunk(segment.first, raw, scale, encoding, layout, coordinate)


def is_mapped(segment: Segment) -> bool:
    """Whether a chunk is a plain file of this machine."""
    return segment.codec == "none" and isinstance(segment.folder, Path)


def _stamp(segment: Segment) -> Hashable:
    """Tells the chunk's file from another one in its place; None in an object store, and where there is none."""
    with suppress(OSError):
        return file_stamp(_file(segment, GRADIENTS)) if isinstance(segment.folder, Path) else None
    return None


def _file(segment: Segment, array: str) -> str:
    """A chunk's file as text: a path object would cost as much again as reading a row of it."""
    return f"{segment.folder}/{array}/{chunk_name(segment.chunk, 2)}"


def _mapped(
    segment: Segment, array: str, dtype: torch.dtype, shape: tuple[int, int], *, codec: str = "none", check: bool
) -> Tensor:
    """Numbers of a chunk; mapped where they are not compressed."""
    file = chunk_file(segment.folder / array, segment.chunk, 2)
    size = math.prod(shape) * dtype.itemsize
    try:
        found = file_size(file)
        if codec == "none" and found != size + CHECKSUM_BYTES:
            raise damaged(file, str(segment), f"has {found} bytes, expected {size + CHECKSUM_BYTES}")
        content = map_bytes(file)
    except OSError as error:
        raise unreadable(file, str(segment), error) from error
    data = np.frombuffer(content, np.uint8)
    if check and not _intact(data, segment.crc.get(array)):
        raise damaged(file, str(segment), "does not match its checksum")
    if codec == "none":
        return torch.frombuffer(content, dtype=dtype, count=math.prod(shape)).view(shape)
    return torch.from_numpy(_decompressed(file, segment, data[:-CHECKSUM_BYTES], size)).view(dtype).view(shape)


def _decompressed(file: Place, segment: Segment, data: np.ndarray, size: int) -> np.ndarray:
    if segment.codec not in CODECS:
        raise damaged(file, str(segment), f"is compressed by {segment.codec!r} (known: {', '.join(CODECS)})")
    try:
        return CODECS[segment.codec].decode(data, size)
    except (ValueError, MemoryError) as error:
        raise damaged(file, str(segment), f"cannot be decompressed ({error})") from error


def _intact(data: np.ndarray, crc: int | None) -> bool:
    size = len(data) - CHECKSUM_BYTES
    return size >= 0 and checksum(data[:size]) == crc == int.from_bytes(data[size:].tobytes(), "little")


def row_numbers(key: RowKey, rows: int) -> np.ndarray:
    """Row numbers, int64, that a key of a table of ``rows`` rows stands for; IndexError outside."""
    if isinstance(key, EllipsisType):
        key = slice(None)
    if isinstance(key, slice):
        return np.arange(*key.indices(rows), dtype=np.int64)
    wanted = np.atleast_1d(np.asarray(key))
    if wanted.dtype == bool:
        if wanted.shape != (rows,):
            raise IndexError(f"a mask of shape {wanted.shape} for {rows} rows; give one entry for each row")
        return np.flatnonzero(wanted)
    if wanted.ndim != 1 or (wanted.size and not np.issubdtype(wanted.dtype, np.integer)):
        raise IndexError(f"rows are chosen by numbers, a slice or a mask, found {key!r}")
    wanted = wanted.astype(np.int64)
    if wanted.size and not (-rows <= wanted.min() and wanted.max() < rows):
        raise IndexError(f"row {wanted.min() if wanted.min() < -rows else wanted.max()} of {rows} rows")
    return np.where(wanted < 0, wanted + rows, wanted)
