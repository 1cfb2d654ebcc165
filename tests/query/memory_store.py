"""A store in memory with the reading face of a real one: what query tests ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logix_like.layout import DataId, Layout
from logix_like.statistics import Statistics
from logix_like.store.encoding.kinds import ENCODINGS
from logix_like.store.reading.gradients import RowChunk, RowKey, row_numbers


class MemoryGradients:
    """Rows by slice or index array."""

    mapped = True

    def __init__(self, table: MemoryRows) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, key: RowKey) -> Tensor:
        numbers = row_numbers(key, len(self))
        return self._table.chunk(0, len(self)).select(numbers, 0).decode()

    def selected(self, rows: NDArray[np.int64]) -> Iterator[RowChunk]:
        self._table.scans += 1
        size = self._table.chunk_rows
        for start in range(0, len(self._table), size):
            first, last = np.searchsorted(rows, [start, start + size])
            if first < last:
                whole = self._table.chunk(start, min(start + size, len(self._table)))
                yield whole.select(rows[first:last] - start, int(first))


@dataclass(eq=False)
class MemoryRows:
    """Rows, one for each visit or sample; counts how often they were read through."""

    layout: Layout
    rows: Tensor
    ids: Sequence[DataId]
    valid: NDArray[np.bool_]
    step: NDArray[np.int64]
    key: str = "rows"
    factor: NDArray[np.float64] | None = None
    chunk_rows: int = 7
    left_out: int = 0
    scans: int = field(default=0, init=False)
    columns: dict[str, NDArray[np.object_]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def data_id(self) -> NDArray[np.object_]:
        """Ids as a real store gives them."""
        ids = np.empty(len(self.ids), dtype=object)
        ids[:] = list(self.ids)
        return ids

    @property
    def gradients(self) -> MemoryGradients:
        """Random access."""
        return MemoryGradients(self)

    @property
    def visits(self) -> NDArray[np.int64]:
        """One for each row."""
        return np.ones(len(self), dtype=np.int64)

    @property
    def epoch(self) -> NDArray[np.int64]:
        """Not known."""
        return np.full(len(self), -1)

    @property
    def loss(self) -> NDArray[np.float64]:
        """Not known."""
        return np.full(len(self), np.nan)

    lr = loss

    @property
    def norm(self) -> NDArray[np.float64]:
        """Of each row."""
        return np.asarray(self.rows.double().norm(dim=1).numpy())

    @property
    def metadata(self) -> Mapping[str, NDArray[np.object_]]:
        """The user's columns."""
        return self.columns

    def chunk(self, start: int, stop: int) -> RowChunk:
        """The rows from ``start`` to ``stop``."""
        name = str(self.rows.dtype).removeprefix("torch.")
        return RowChunk(start, self.rows[start:stop], None, ENCODINGS[name], self.layout)

    def chunks(self) -> Iterator[RowChunk]:
        """All rows, ``chunk_rows`` at a time."""
        self.scans += 1
        for start in range(0, len(self.rows), self.chunk_rows):
            yield self.chunk(start, start + self.chunk_rows)


class MemoryStore(MemoryRows):
    """All visits, with statistics and sample views."""

    damaged_rows = 0
    projections_digest = ""

    def __init__(
        self,
        layout: Layout,
        rows: Tensor,
        ids: Sequence[DataId] | None = None,
        *,
        valid: Sequence[bool] | None = None,
        statistics: Statistics | None = None,
        chunk_rows: int = 7,
    ) -> None:
        mask = np.ones(len(rows), dtype=bool) if valid is None else np.array(valid, dtype=bool)
        names = [f"s{i}" for i in range(len(rows))] if ids is None else ids
        super().__init__(layout, rows, names, mask, np.arange(len(rows)) * 10, chunk_rows=chunk_rows)
        self.statistics = Statistics(layout, {}, 0) if statistics is None else statistics
        self.views: dict[str, MemoryRows] = {}

    def grow(self, rows: Tensor, statistics: Statistics) -> None:
        """Hold other rows, as a store does that was refreshed."""
        fresh = MemoryStore(self.layout, rows, statistics=statistics)
        self.__dict__.update(fresh.__dict__, key=f"{self.key}+")

    def view(self, reduce: str) -> MemoryRows:
        """One row for each sample, or each visit by itself."""
        if reduce == "none":
            return self
        if reduce not in self.views:
            self.views[reduce] = self._combined(reduce)
        return self.views[reduce]

    def _combined(self, reduce: str) -> MemoryRows:
        visits: dict[DataId, list[int]] = {}
        for position in np.flatnonzero(self.valid).tolist():
            visits.setdefault(self.ids[position], []).append(position)
        groups = list(visits.values())
        chosen = [group[-1:] if reduce == "last" else group for group in groups]
        rows = torch.stack([self.rows[group].mean(0) for group in chosen])
        factor = np.array([float(len(group)) for group in groups]) if reduce == "sum" else None
        everything = np.ones(len(rows), dtype=bool)
        step = np.array([self.step[group[-1]] for group in groups])
        key = f"{self.key}-{'mean' if reduce == 'sum' else reduce}"  # a sum is read from the means, as in a store
        return MemoryRows(self.layout, rows, list(visits), everything, step, key, factor, self.chunk_rows)
