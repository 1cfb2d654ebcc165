"""Committed rows seen as one table: columns in memory, gradients mapped from their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any
from urllib.parse import unquote

import numpy as np

from logix_like.layout import Layout
from logix_like.store.encoding.kinds import Encoding
from logix_like.store.format.arrays import chunk_file, damaged, read_chunk, unreadable
from logix_like.store.format.columns import decode_ids, decode_texts, decode_values
from logix_like.store.format.commits import Commits, RowsRecord
from logix_like.store.format.retractions import Retraction
from logix_like.store.format.schema import COLUMNS, DATA_ID, INVALID, METADATA, ROOT_MODULE, Flag
from logix_like.store.format.segments import Segment
from logix_like.store.places.files import CHECKSUM_BYTES, Place, file_size
from logix_like.store.places.hold import FolderHold
from logix_like.store.reading.gradients import GradientReader, RowChunk

MANY_ROWS = 100_000
"""A chunk that is said to have more rows is looked at before it is believed, ..."""
MANY_ROWS_IN_ALL = 10_000_000
"""... and so are the further ones of a table that is said to have more."""


class RowTable:
    """Rows of some parts, one after another, as they were at one moment; never changes.

    Columns are numpy arrays, read at first use and then kept: ``step`` and ``epoch`` (int64, -1 unknown),
    ``loss``, ``norm`` and ``lr`` (float64, NaN unknown), ``flags`` (int64), ``data_id`` (object).
    They are shared: do not write to them.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        layout: Layout,
        encoding: Encoding,
        column_names: tuple[str, ...],
        key: str,
        *,
        left_out: int = 0,
        factor: np.ndarray | None = None,
        hold: FolderHold | None = None,
    ) -> None:
        self.layout = layout
        """The rows' module table."""
        self.encoding = encoding
        """How the rows are stored."""
        self.key = key
        """Identifies the rows: equal keys, equal rows."""
        self.left_out = left_out
        """Samples that are not there since none of their visits is valid (views only)."""
        self.factor = factor
        """Multiplier ``[n]`` of each row, None for 1."""
        self.segments = tuple(segments)
        """Where the rows lie."""
        self.hold = hold
        """Keeps the files from being removed, where somebody else might (views only)."""
        self.column_names = column_names
        """Names of the columns of numbers."""
        self.gradients = GradientReader(self.segments, layout, encoding, hold)
        """Rows by slice, index array, mask or number: float32 tensors ``[n, width]``."""

    def __len__(self) -> int:
        return self.gradients.rows

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows of {self.layout.width} numbers)"

    def chunks(self) -> Iterator[RowChunk]:
        """All rows in order, chunk by chunk, mapped and not copied."""
        return self.gradients.chunks()

    @property
    def numbers(self) -> np.ndarray:
        """All columns of numbers as they are stored, float64 ``[n, columns]``."""
        return self._numbers

    def number(self, name: str) -> np.ndarray:
        """A column of numbers by name, float64 ``[n]``."""
        return self._numbers[:, self.column_names.index(name)]

    @cached_property
    def step(self) -> np.ndarray:
        """Optimizer step of each row."""
        return self.number("step").astype(np.int64)

    @cached_property
    def epoch(self) -> np.ndarray:
        """Epoch of each row."""
        return self.number("epoch").astype(np.int64)

    @property
    def loss(self) -> np.ndarray:
        """Loss of each row's sample."""
        return self.number("loss")

    @property
    def norm(self) -> np.ndarray:
        """Euclidean norm of each row before rounding."""
        return self.number("norm")

    @property
    def lr(self) -> np.ndarray:
        """Learning rate of each row's step."""
        return self.number("lr")

    @cached_property
    def flags(self) -> np.ndarray:
        """Bits of :class:`~logix_like.store.format.schema.Flag`, those of rows taken back since included."""
        flags = self._stored_flags.copy()
        for segment in self.segments:
            rows = slice(segment.first, segment.stop)
            for retraction in segment.retractions:
                taken = retraction.takes(self.step[rows], partial(self._ids_of, rows))
                flags[rows][taken] |= int(Flag.SUPERSEDED)
        return flags

    def _ids_of(self, rows: slice) -> np.ndarray:
        ids: np.ndarray = self.data_id[rows]
        return ids

    @cached_property
    def valid(self) -> np.ndarray:
        """Mask of the rows that count: finite, and not superseded."""
        mask: np.ndarray = (self.flags & int(INVALID)) == 0
        return mask

    @cached_property
    def visits(self) -> np.ndarray:
        """How many visits each row stands for."""
        if "visits" in self.column_names:
            return self.number("visits").astype(np.int64)
        return np.ones(len(self), dtype=np.int64)

    @cached_property
    def data_id(self) -> np.ndarray:
        """The sample's id of each row, str or int."""
        return decode_ids(self._texts(DATA_ID), (self._stored_flags & int(Flag.INTEGER_ID)) != 0)

    @cached_property
    def metadata(self) -> Mapping[str, np.ndarray]:
        """The user's columns by name; None where a row was logged without a value."""
        return MetadataColumns(self)

    def metadata_arrays(self) -> dict[str, str]:
        """The user's columns by name, with the path of their arrays, in order of appearance."""
        arrays = dict.fromkeys(array for segment in self.segments for array in segment.crc)
        return {_column_name(a): a for a in arrays if a.startswith(f"{METADATA}/")}

    def metadata_column(self, name: str) -> np.ndarray:
        """Values of one of the user's columns, object ``[n]``."""
        return decode_values(self._texts(self.metadata_arrays()[name], missing="null"), name)

    @cached_property
    def _stored_flags(self) -> np.ndarray:
        return self.number("flags").astype(np.int64)

    @cached_property
    def _numbers(self) -> np.ndarray:
        width = len(self.column_names)
        numbers = np.empty((len(self), width))
        for segment in self.segments:
            content = self._chunk(segment, COLUMNS, 2, 8 * segment.rows * width)
            numbers[segment.first : segment.stop] = content.view("<f8").reshape(segment.rows, width)
        return numbers

    def _texts(self, array: str, missing: str | None = None) -> np.ndarray:
        texts = np.empty(len(self), dtype=object)
        for segment in self.segments:
            if array not in segment.crc and missing is not None:
                texts[segment.first : segment.stop] = missing
                continue
            content = self._chunk(segment, array, 1, None)
            texts[segment.first : segment.stop] = decode_texts(content, segment.rows, str(segment))
        return texts

    def _chunk(self, segment: Segment, array: str, dimensions: int, size: int | None) -> np.ndarray:
        file = chunk_file(segment.folder / array, segment.chunk, dimensions)
        if array not in segment.crc:
            raise damaged(file, f"{array} of {segment}", "is not named by the commit record")
        return read_chunk(file, f"{array} of {segment}", size=size, crc=segment.crc[array])


class MetadataColumns(Mapping[str, np.ndarray]):
    """The user's columns of a table, each read at its first use."""

    def __init__(self, table: RowTable) -> None:
        self._table = table
        self._names = tuple(table.metadata_arrays())
        self._columns: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(f"no metadata column {name!r}; there are: {', '.join(self._names) or 'none'}")
        if name not in self._columns:
            self._columns[name] = self._table.metadata_column(name)
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class PartSource:
    """A part that a table is made of."""

    folder: Place
    """Where it lies."""
    name: str
    """What it is called in the table's key."""
    commits: Commits
    """Its record."""
    retractions: tuple[Retraction, ...] = field(default=())
    """Those of its store."""


def make_table(
    parts: Sequence[PartSource],
    layout: Layout,
    encoding: Encoding,
    column_names: tuple[str, ...],
    kind: str,
) -> RowTable:
    """The committed rows of ``parts``, in their order; the key tells of the rows and their kind."""
    segments: list[Segment] = []
    first = 0
    identity = hashlib.blake2b(digest_size=16)
    for part in parts:
        for record in part.commits.rows:
            folder = record.within(part.folder)
            if record.rows > MANY_ROWS or first > MANY_ROWS_IN_ALL:
                _require_rows(folder, record, len(column_names))
            reached = tuple(r for r in part.retractions if r.reaches(part.name, record.sequence))
            segments.append(Segment(folder, record.chunk, first, record.rows, record.crc, reached, record.codec))
            first += record.rows
            entry: list[Any] = [part.name, record.part, record.chunk, record.rows, sorted(record.crc.items())]
            entry += [retraction.digest for retraction in reached]
            identity.update(json.dumps(entry).encode())
    return RowTable(segments, layout, encoding, column_names, f"{kind}:{identity.hexdigest()}")


def _require_rows(folder: Place, record: RowsRecord, columns: int) -> None:
    """Refuse a record that claims far more rows than there are, before memory is taken for them."""
    file = chunk_file(folder / COLUMNS, record.chunk, 2)
    try:
        found = file_size(file)
    except OSError as error:
        raise unreadable(file, f"{record.rows} rows by the commit record", error) from error
    if found != 8 * record.rows * columns + CHECKSUM_BYTES:
        raise damaged(file, f"{record.rows} rows by the commit record", f"has {found} bytes")


def _column_name(array: str) -> str:
    name = array.removeprefix(f"{METADATA}/")
    return "" if name == ROOT_MODULE else unquote(name)
