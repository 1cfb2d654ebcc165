"""A range of rows as plain data, to be read by another process that sees the same files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from torch import Tensor

from logix_like.errors import QueryError
from logix_like.layout import Layout
from logix_like.store.encoding.kinds import ENCODINGS
from logix_like.store.format.segments import Segment
from logix_like.store.places.files import Place, as_place
from logix_like.store.reading.gradients import GradientReader, RowChunk, RowKey, row_numbers
from logix_like.store.reading.table import RowTable
from logix_like.store.reading.view import Rows, SelectedRows


@dataclass(frozen=True, eq=False)
class RowRange:
    """Rows ``start`` to ``stop - 1`` of a view of a store; can be pickled, and is a key of caches."""

    key: str
    """Identifies the view."""
    start: int
    stop: int
    segments: tuple[Segment, ...]
    """The chunks that hold them; their folders are text, since a connection cannot be sent to another process."""
    layout: Layout
    encoding: str
    """Name of the rows' encoding."""
    numbers: np.ndarray | None
    """``[stop - start]``: where the rows stand in the table, None for ``start`` to ``stop - 1``."""
    mapped: bool
    """Whether the chunks are plain files, to be mapped."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowRange) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str, int, int]:
        """With the folder: a copy of a store has its key, and may outlive it."""
        return self.key, str(self.segments[0].folder), self.start, self.stop

    def open(self) -> RangeGradients:
        """A reader of these rows."""
        numbers = np.arange(self.start, self.stop) if self.numbers is None else self.numbers
        segments = [replace(segment, folder=as_place(str(segment.folder))) for segment in self.segments]
        return RangeGradients(GradientReader(segments, self.layout, ENCODINGS[self.encoding]), numbers)


class RangeGradients:
    """The gradients of a range, its rows counted from 0."""

    def __init__(self, reader: GradientReader, numbers: np.ndarray) -> None:
        self._reader = reader
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def mapped(self) -> bool:
        """Whether chunks are mapped files."""
        return self._reader.mapped

    def __getitem__(self, key: RowKey) -> Tensor:
        """Decoded rows ``[n, width]``."""
        return self._reader[self._numbers[row_numbers(key, len(self))]]

    def selected(self, rows: np.ndarray) -> Iterator[RowChunk]:
        """The rows of these ascending numbers, by chunk; ``start`` counts within them."""
        return self._reader.selected(self._numbers[rows])


def row_range(rows: Rows, start: int, stop: int) -> RowRange:
    """Describe a range of ``rows``; :class:`QueryError` where they are not rows of a store's files."""
    table, numbers = rows, None
    if isinstance(rows, SelectedRows):
        table, numbers = rows.table, rows.numbers[start:stop]
    if not isinstance(table, RowTable):
        raise QueryError(
            f"{type(rows).__name__} lies in this process alone: only rows of a store can be read elsewhere"
        )
    first, last = (start, stop - 1) if numbers is None else (int(numbers[0]), int(numbers[-1]))
    held = (segment for segment in table.segments if segment.first <= last and first < segment.stop)
    segments = tuple(replace(segment, folder=cast(Place, str(segment.folder))) for segment in held)
    mapped = table.gradients.mapped
    return RowRange(rows.key, start, stop, segments, table.layout, table.encoding.name, numbers, mapped)
