"""Reading rows for a query: which rows take part, and their numbers, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from logix_like.errors import EmptyStoreError, QueryError
from logix_like.layout import DataId
from logix_like.store.gradients import RowChunk
from logix_like.store.view import Rows

SPARSE_SHARE = 8
"""When fewer than one row in so many is wanted, rows are fetched one by one instead of by chunks."""
GATHERED_ROWS = 512
"""Rows fetched one by one are held so many at a time."""
PROGRESS_NUMBERS = 2**28
"""Rows with fewer numbers than this in all are scanned in a moment: no progress bar."""
PROGRESS_DELAY = 2.0
"""Seconds before a progress bar shows itself."""
PIECE_BYTES = 2 * 2**20
"""Decoded rows that are used once are made so many bytes at a time: they then stay in the caches."""


@dataclass(frozen=True, eq=False)
class Tile:
    """Some rows of a scan, decoded when asked for."""

    positions: Tensor
    """``[n]``, where the rows stand among all rows; ascending."""
    read: Callable[[int, int, Tensor | None], Tensor]
    """From a, b and a buffer that may be used, rows a to b - 1 of these: ``[b - a, width]``."""

    held: Tensor | None = None
    """``[n, width]``: all of these rows, where they are kept decoded; not to be written to."""

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.positions)

    @property
    def values(self) -> Tensor:
        """All of the rows, ``[n, width]``."""
        return self.read(0, len(self), None) if self.held is None else self.held

    def pieces(self, buffer: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the rows in pieces that fit ``buffer [m, width]``, as ``(a, b, values [b - a, width])``.

        The values are good until the next piece: they may lie in the buffer.
        """
        for start in range(0, len(self), len(buffer)):
            stop = min(start + len(buffer), len(self))
            yield start, stop, self.read(start, stop, buffer)


@dataclass(eq=False)
class Memory:
    """What is kept from one scan of some rows to the next."""

    keep_bytes: int
    """Rows that take no more than this in all, decoded, are kept."""
    spare: list[Tensor] = field(default_factory=list)
    """Buffers that nobody uses at the moment."""
    tile: Tile | None = None
    """All valid rows, decoded, where they are few."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The rows of ``rows`` that take part in an answer: none that is invalid, whatever was asked."""

    rows: Rows
    wanted: Tensor
    """``[rows]`` bool."""
    count: int
    """How many are wanted."""
    complete: bool
    """Whether every valid row is wanted."""
    dtype: torch.dtype
    """Of decoded rows."""
    memory: Memory
    """Shared by all scans of the same rows."""

    @classmethod
    def valid(cls, rows: Rows, keep_bytes: int = 0) -> Candidates:
        """All valid rows; :class:`EmptyStoreError` when there is none."""
        wanted = torch.from_numpy(np.array(rows.valid, dtype=bool))
        count = int(wanted.sum())
        if not count:
            raise EmptyStoreError(
                f"the store holds {len(rows)} rows and none that can be ranked; log some samples "
                "(a row takes part when its gradient is finite) before asking"
            )
        return cls(rows, wanted, count, True, rows.gradients[0:1].dtype, Memory(keep_bytes))

    def restrict(self, data_id: Sequence[DataId]) -> Candidates:
        """Only rows with one of these ids; :class:`QueryError` names the first id that no valid row has."""
        position_of: dict[DataId, list[int]] = {}
        ids = self.rows.data_id[:]
        for position in self.wanted.nonzero().flatten().tolist():
            position_of.setdefault(ids[position], []).append(position)
        wanted = torch.zeros_like(self.wanted)
        for one in data_id:
            if one not in position_of:
                raise QueryError(
                    f"no sample with the id {one!r} ({type(one).__name__}) can be ranked; the store has "
                    f"{len(position_of)} ids, the first is {next(iter(position_of))!r}"
                )
            wanted[position_of[one]] = True
        count = int(wanted.sum())
        if not count:
            raise QueryError("data_id names no sample: leave it out to rank all of them")
        return replace(self, wanted=wanted, count=count, complete=count == self.count)

    @contextmanager
    def buffer(self) -> Iterator[Tensor]:
        """Lend memory for pieces of the rows (:meth:`Tile.pieces`): ``[m, width]``.

        It is kept for the next scan: new memory would have to be mapped page by page each time.
        """
        try:
            lent = self.memory.spare.pop()
        except IndexError:
            width = self.rows.layout.width
            lent = torch.empty(max(1, PIECE_BYTES // (self.dtype.itemsize * width)), width, dtype=self.dtype)
        try:
            yield lent
        finally:
            self.memory.spare.append(lent)

    def positions(self) -> Tensor:
        """``[count]``, where the wanted rows stand; ascending."""
        return self.wanted.nonzero().flatten()

    def tiles(self, progress: bool | None, what: str) -> Iterator[Tile]:
        """Yield the wanted rows in order; memory is bounded by a few chunks and what is kept.

        ``progress`` shows a bar named ``what``: always, never, or (None) on a terminal when it takes long.
        """
        size = self.count * self.rows.layout.width * self.dtype.itemsize
        if self.complete and size <= self.memory.keep_bytes:
            yield self._kept()
            return
        sparse = self.count * SPARSE_SHARE < len(self.rows)
        tiles = self._gathered() if sparse else self._streamed()
        if progress is False or (progress is None and self.count * self.rows.layout.width < PROGRESS_NUMBERS):
            yield from tiles
            return
        delay = 0.0 if progress else PROGRESS_DELAY
        hidden = None if progress is None else False  # None: hidden unless the output is a terminal
        with tqdm(total=self.count, desc=what, unit="row", unit_scale=True, delay=delay, disable=hidden) as bar:
            for tile in tiles:
                yield tile
                bar.update(len(tile))

    def fetch(self, positions: Tensor) -> Tile:
        """The rows at ``positions [n]``, fetched one by one."""
        return Tile(positions, partial(_fetch, self.rows, positions.numpy()))

    def _kept(self) -> Tile:
        """All rows as one tile, decoded at the first scan."""
        if self.memory.tile is None:
            decoded = torch.empty(self.count, self.rows.layout.width, dtype=self.dtype)
            start = 0
            for tile in self._streamed():
                decoded[start : start + len(tile)] = tile.values
                start += len(tile)
            self.memory.tile = Tile(self.positions(), partial(_slice, decoded), decoded)
        return self.memory.tile

    def _streamed(self) -> Iterator[Tile]:
        for chunk in self.rows.chunks():
            wanted = self.wanted[chunk.start : chunk.stop]
            chosen = wanted.nonzero().flatten()
            if len(chosen):
                whole = len(chosen) == len(chunk)
                yield Tile(chosen + chunk.start, partial(_decode, chunk, None if whole else chosen.numpy()))

    def _gathered(self) -> Iterator[Tile]:
        for positions in self.positions().split(GATHERED_ROWS):
            yield self.fetch(positions)


def _slice(decoded: Tensor, start: int, stop: int, buffer: Tensor | None) -> Tensor:
    return decoded[start:stop]


def _decode(chunk: RowChunk, chosen: NDArray[np.int64] | None, start: int, stop: int, buffer: Tensor | None) -> Tensor:
    if chosen is None and buffer is not None and chunk.scale is None and chunk.raw.is_floating_point():
        # Floats without scales are stored as they are, so widening is all there is to decode; into a buffer that
        # stays in the caches it takes about half the time that it takes into new memory.
        return buffer[: stop - start].copy_(chunk.raw[start:stop])
    numbers = np.arange(start, stop) if chosen is None else chosen[start:stop]
    return chunk.select(numbers, start).decode()


def _fetch(rows: Rows, positions: NDArray[np.int64], start: int, stop: int, buffer: Tensor | None) -> Tensor:
    return rows.gradients[positions[start:stop]]
