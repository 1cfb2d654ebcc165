"""A store in memory with the reading face of a real one: what query tests ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logix_like.layout import DataId, Layout
from logix_like.statistics import Statistics


@dataclass(frozen=True, eq=False)
class MemoryChunk:
    """Some adjoining rows."""

    start: int
    raw: Tensor

    def decode(self) -> Tensor:
        """Bfloat16 comes as float32, all else as it is."""
        return self.raw.float() if self.raw.dtype == torch.bfloat16 else self.raw.clone()


class MemoryGradients:
    """Rows by slice or index array."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __getitem__(self, key: slice | NDArray[np.int64]) -> Tensor:
        index = key if isinstance(key, slice) else torch.from_numpy(key)
        return MemoryChunk(0, self._rows[index]).decode()


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
    scans: int = field(default=0, init=False)

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
        return MemoryGradients(self.rows)

    def chunks(self) -> Iterator[MemoryChunk]:
        """All rows, ``chunk_rows`` at a time."""
        self.scans += 1
        for start in range(0, len(self.rows), self.chunk_rows):
            yield MemoryChunk(start, self.rows[start : start + self.chunk_rows])


class MemoryStore(MemoryRows):
    """All visits, with statistics and sample views."""

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
        key = f"{self.key}-{reduce}"
        return MemoryRows(self.layout, rows, list(visits), everything, step, key, factor, self.chunk_rows)
