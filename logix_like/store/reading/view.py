"""Rows by sample: what is scanned and ranked by default is one row for each sample.

A sample that was visited in several epochs has several rows. A view combines them: ``mean`` and
``sum`` of its valid visits, the ``last`` of them, or ``none`` of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from torch import Tensor

from logix_like.layout import Layout
from logix_like.store.reading.gradients import RowChunk, RowKey, row_numbers
from logix_like.store.reading.table import RowTable

REDUCTIONS = ("mean", "sum", "last", "none")
"""Ways to combine a sample's visits."""


class Gradients(Protocol):
    """Rows of gradients by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: RowKey, /) -> Tensor:
        """Decoded rows ``[n, width]``."""
        ...

    @property
    def mapped(self) -> bool:
        """Whether chunks are mapped files; else each is read, and decompressed, when it comes."""
        ...

    def selected(self, rows: np.ndarray, /) -> Iterator[RowChunk]:
        """The rows of these ascending numbers, by chunk; ``start`` counts within them."""
        ...


class Rows(Protocol):
    """What can be scanned and ranked; the query engine depends on this alone."""

    def __len__(self) -> int: ...

    @property
    def layout(self) -> Layout:
        """The rows' module table."""
        ...

    @property
    def key(self) -> str:
        """Identifies the rows, for caches: equal keys, equal rows."""
        ...

    @property
    def data_id(self) -> np.ndarray:
        """The sample's id of each row, object ``[n]`` of str and int."""
        ...

    @property
    def step(self) -> np.ndarray:
        """Step of each row (of a sample's last visit), int64, -1 unknown."""
        ...

    @property
    def epoch(self) -> np.ndarray:
        """The same for the epoch."""
        ...

    @property
    def loss(self) -> np.ndarray:
        """Loss (mean over the visits that the row stands for), float64, NaN unknown."""
        ...

    @property
    def norm(self) -> np.ndarray:
        """Euclidean norm of each row, float64."""
        ...

    @property
    def lr(self) -> np.ndarray:
        """Learning rate (at the last visit), float64, NaN unknown."""
        ...

    @property
    def metadata(self) -> Mapping[str, np.ndarray]:
        """The user's columns (at the last visit)."""
        ...

    @property
    def valid(self) -> np.ndarray:
        """Mask of the rows that count; others must not be ranked."""
        ...

    @property
    def visits(self) -> np.ndarray:
        """How many visits each row stands for, int64."""
        ...

    @property
    def factor(self) -> np.ndarray | None:
        """What each row is to be multiplied with, float64 ``[n]``, or None."""
        ...

    @property
    def left_out(self) -> int:
        """Samples that are not there, since none of their visits is valid."""
        ...

    @property
    def gradients(self) -> Gradients:
        """Rows by slice, numbers or mask, without the factor."""
        ...

    def chunks(self) -> Iterator[RowChunk]:
        """All rows in order, in pieces of bounded size, without the factor."""
        ...


@dataclass(frozen=True)
class Visits:
    """Which rows belong to which sample; samples are numbered by their first valid visit."""

    rows: np.ndarray
    """Numbers of the valid rows, ascending."""
    sample: np.ndarray
    """For each of these, the number of its sample."""
    count: np.ndarray
    """Valid visits of each sample."""
    left_out: int
    """Samples without a valid visit."""

    @property
    def single(self) -> bool:
        """Whether no sample has two."""
        return len(self.rows) == len(self.count)


def group_visits(table: RowTable) -> Visits:
    """Group a table's valid rows by sample; an int id and its text are two samples."""
    rows = np.flatnonzero(table.valid)
    numbers: dict[object, int] = {}
    sample = np.fromiter(
        (numbers.setdefault(data_id, len(numbers)) for data_id in table.data_id[rows]), np.int64, len(rows)
    )
    everyone = len(numbers) if len(rows) == len(table) else len(set(table.data_id))
    return Visits(rows, sample, np.bincount(sample, minlength=len(numbers)), everyone - len(numbers))


def last_visits(table: RowTable, visits: Visits) -> np.ndarray:
    """For each sample the row of its last visit: the highest epoch, then step, then row."""
    order = np.lexsort((visits.rows, table.step[visits.rows], table.epoch[visits.rows]))
    last = np.empty(len(visits.count), dtype=np.int64)
    last[visits.sample[order]] = visits.rows[order]  # of several values the last one stays
    return last


class SelectedRows:
    """Some rows of a table, by ascending numbers; they are read where they lie."""

    factor: np.ndarray | None = None
    """No row is scaled."""

    def __init__(self, table: RowTable, rows: np.ndarray, visits: np.ndarray, *, left_out: int, key: str) -> None:
        self._table = table
        self._rows = rows
        self.layout = table.layout
        """The rows' module table."""
        self.visits = visits
        """How many visits each row stands for."""
        self.left_out = left_out
        """Samples that are not there, since none of their visits is valid."""
        self.key = key
        """Identifies the rows."""
        self.gradients = SelectedGradients(table, rows)
        """Rows by slice, numbers or mask."""

    @property
    def table(self) -> RowTable:
        """The table that the rows are taken from."""
        return self._table

    @property
    def numbers(self) -> np.ndarray:
        """Where they stand in it, ascending."""
        return self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def chunks(self) -> Iterator[RowChunk]:
        """The rows in order, in pieces of at most a chunk."""
        return self._table.gradients.selected(self._rows)

    @cached_property
    def data_id(self) -> np.ndarray:
        """The sample's id of each row."""
        return self._of(self._table.data_id)

    @property
    def step(self) -> np.ndarray:
        """Step of each row."""
        return self._of(self._table.step)

    @property
    def epoch(self) -> np.ndarray:
        """Epoch of each row."""
        return self._of(self._table.epoch)

    @property
    def loss(self) -> np.ndarray:
        """Loss of each row's sample."""
        return self._of(self._table.loss)

    @property
    def norm(self) -> np.ndarray:
        """Norm of each row."""
        return self._of(self._table.norm)

    @property
    def lr(self) -> np.ndarray:
        """Learning rate of each row."""
        return self._of(self._table.lr)

    @property
    def metadata(self) -> Mapping[str, np.ndarray]:
        """The user's columns."""
        return {name: self._of(column) for name, column in self._table.metadata.items()}

    @cached_property
    def valid(self) -> np.ndarray:
        """All of them: only valid rows are selected."""
        return np.ones(len(self), dtype=bool)

    def _of(self, column: np.ndarray) -> np.ndarray:
        selected: np.ndarray = column[self._rows]
        return selected


class SelectedGradients:
    """Gradients of some rows of a table."""

    def __init__(self, table: RowTable, rows: np.ndarray) -> None:
        self._gradients = table.gradients
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: RowKey) -> Tensor:
        """Decoded rows ``[n, width]``, or one row ``[width]`` for a single number."""
        wanted = self._rows[row_numbers(key, len(self._rows))]
        return self._gradients[int(wanted[0]) if isinstance(key, int | np.integer) else wanted]

    @property
    def mapped(self) -> bool:
        """Whether chunks are mapped files."""
        return self._gradients.mapped

    def selected(self, rows: np.ndarray) -> Iterator[RowChunk]:
        """The rows of these ascending numbers, by chunk; ``start`` counts within them."""
        return self._gradients.selected(self._rows[rows])


def select_last(table: RowTable, visits: Visits, kind: str) -> SelectedRows:
    """The last valid visit of each sample, in row order."""
    last = last_visits(table, visits)
    order = np.argsort(last)
    key = f"{kind}:{digest(table)}"
    return SelectedRows(table, last[order], visits.count[order], left_out=visits.left_out, key=key)


def digest(table: RowTable) -> str:
    """The part of a table's key that tells of its rows."""
    return table.key.partition(":")[2]
