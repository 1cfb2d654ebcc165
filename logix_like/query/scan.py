"""Reading rows for a query: which rows take part, and their numbers, a bounded piece at a time."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from logix_like.errors import EmptyStoreError, QueryError
from logix_like.store.reading.gradients import RowChunk
from logix_like.store.reading.view import Rows

PROGRESS_NUMBERS = 2**28
"""Rows with fewer numbers than this in all are scanned in a moment: no progress bar."""
CHUNKS_AHEAD = 2
"""So many chunks are read before they are needed, where they are not mapped."""
PROGRESS_DELAY = 2.0
"""Seconds before a progress bar shows itself."""
PIECE_BYTES = 2 * 2**20
"""Decoded rows that are used once are made so many bytes at a time: they then stay in the caches."""


class Tile(ABC):
    """Some rows of a scan, decoded when asked for."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions
        """``[n]``, where the rows stand among all rows; ascending."""

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.positions)

    @abstractmethod
    def read(self, start: int, stop: int, buffer: Tensor | None = None, *, in_units: bool = False) -> Tensor:
        """Rows ``start`` to ``stop - 1`` of these, ``[stop - start, width]``; ``buffer`` may be used for them.

        ``in_units`` leaves each coordinate in its unit (:attr:`units`).
        """

    @abstractmethod
    def take(self, numbers: NDArray[np.int64]) -> Tensor:
        """Rows by ascending numbers within the tile, ``[n, width]``."""

    @property
    def values(self) -> Tensor:
        """All of the rows, ``[n, width]``; not to be written to."""
        return self.read(0, len(self))

    @property
    def narrow(self) -> Tensor | None:
        """All of the rows as they are stored, where that is plain bfloat16."""
        return None

    @property
    def units(self) -> Tensor | None:
        """``[width]``: units of the coordinates, where the rows are stored in such; None for 1."""
        return None

    @property
    def lengthened(self) -> Tensor | None:
        """``[n]``, float64: how far rounding to few bits can have lengthened the rows; None where by a last bit."""
        return None

    def pieces(
        self, buffer: Tensor, rows: int | None = None, *, in_units: bool = False
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the first ``rows`` (all) in pieces that fit ``buffer [m, width]``: ``(a, b, values [b - a, width])``.

        The values are good until the next piece: they may lie in the buffer.
        """
        end = len(self) if rows is None else rows
        for start in range(0, end, len(buffer)):
            stop = min(start + len(buffer), end)
            yield start, stop, self.read(start, stop, buffer, in_units=in_units)


class HeldTile(Tile):
    """Rows that are kept decoded in memory."""

    def __init__(self, positions: Tensor, held: Tensor, lengthened: Tensor | None) -> None:
        super().__init__(positions)
        self.held = held
        self._lengthened = lengthened

    @property
    def lengthened(self) -> Tensor | None:
        """That of the stored rows."""
        return self._lengthened

    def read(self, start: int, stop: int, buffer: Tensor | None = None, *, in_units: bool = False) -> Tensor:
        """Give a view."""
        return self.held[start:stop]

    def take(self, numbers: NDArray[np.int64]) -> Tensor:
        """Give a copy."""
        return self.held[torch.from_numpy(numbers)]


class ChunkTile(Tile):
    """Rows of one chunk of a store, still encoded."""

    def __init__(self, positions: Tensor, chunk: RowChunk) -> None:
        super().__init__(positions)
        self._chunk = chunk

    def read(self, start: int, stop: int, buffer: Tensor | None = None, *, in_units: bool = False) -> Tensor:
        """Decode a run of rows: into a buffer that stays in the caches in half the time that new memory takes."""
        out = None if buffer is None else buffer[: stop - start]
        return self._chunk.decode(slice(start, stop), out, in_units=in_units)

    def take(self, numbers: NDArray[np.int64]) -> Tensor:
        """Decode some rows."""
        return self._chunk.select(numbers, 0).decode()

    @property
    def narrow(self) -> Tensor | None:
        """The chunk itself."""
        plain = self._chunk.scale is None and self._chunk.raw.dtype == torch.bfloat16
        return self._chunk.raw if plain else None

    @property
    def units(self) -> Tensor | None:
        """Those of the chunk."""
        return self._chunk.coordinate_scale

    @property
    def lengthened(self) -> Tensor | None:
        """By a unit in each number: it is rounded by half of one, or (a sign) is one unit whatever it was."""
        scale, units = self._chunk.scale, self._chunk.coordinate_scale
        if scale is None or units is None:
            return None
        ends = torch.tensor([block.columns.stop - 1 for block in self._chunk.layout])
        squares = units.double().square().cumsum(0)[ends].diff(prepend=torch.zeros(1, dtype=torch.float64))
        return (scale.double().square() @ squares).sqrt()


@dataclass(eq=False)
class Memory:
    """What is kept from one scan of some rows to the next."""

    keep_bytes: int
    """Rows that take no more than this in all, decoded, are kept."""
    spare: list[Tensor] = field(default_factory=list)
    """Buffers that nobody uses at the moment."""
    tile: HeldTile | None = None
    """All valid rows, decoded, where they are few."""
    narrow: dict[int, bool] = field(default_factory=dict)
    """By number of queries: whether products in bfloat16 were the faster ones, once measured."""


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

    def restrict(self, wanted: Tensor, what: str) -> Candidates:
        """Only those that ``wanted [rows]`` names; :class:`QueryError`, saying ``what`` chose, when none is left."""
        wanted = wanted & self.wanted
        count = int(wanted.sum())
        if not count:
            raise QueryError(f"{what} names no sample that can be ranked: leave it out to rank all {self.count:,}")
        return replace(self, wanted=wanted, count=count, complete=self.complete and count == self.count)

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

    @property
    def fits_in_memory(self) -> bool:
        """Whether all of them, decoded, are few enough to be kept."""
        return self.count * self.rows.layout.width * self.dtype.itemsize <= self.memory.keep_bytes

    @property
    def chosen(self) -> str:
        """Tells choices of rows apart; empty where every valid row is wanted."""
        return "" if self.complete else hashlib.blake2b(self.wanted.numpy().tobytes(), digest_size=16).hexdigest()

    @property
    def factor(self) -> Tensor | None:
        """``[rows]``: what each row is multiplied by; None for 1."""
        return None if self.rows.factor is None else torch.as_tensor(self.rows.factor).to(self.dtype)

    def positions(self) -> Tensor:
        """``[count]``, where the wanted rows stand; ascending."""
        return self.wanted.nonzero().flatten()

    def tiles(self, progress: bool | None, what: str) -> Iterator[Tile]:
        """Yield the wanted rows in order; memory is bounded by a few chunks and what is kept.

        ``progress`` shows a bar named ``what``: always, never, or (None) on a terminal when it takes long.
        """
        if self.complete and self.fits_in_memory:
            yield self._kept()
            return
        with self.bar(progress, what) as advance:
            for tile in self._streamed():
                yield tile
                advance(len(tile))

    @contextmanager
    def bar(self, progress: bool | None, what: str) -> Iterator[Callable[[int], object]]:
        """A progress bar, as in :meth:`tiles`; gives what is to be told how many further rows are done."""
        if progress is False or (progress is None and self.count * self.rows.layout.width < PROGRESS_NUMBERS):
            yield _ignored
            return
        delay = 0.0 if progress else PROGRESS_DELAY
        hidden = None if progress is None else False  # None: hidden unless the output is a terminal
        with tqdm(total=self.count, desc=what, unit="row", unit_scale=True, delay=delay, disable=hidden) as shown:
            yield shown.update

    def fetch(self, positions: Tensor) -> Tensor:
        """The rows at ``positions [n]``, ``[n, width]``."""
        return self.rows.gradients[positions.numpy()]

    def _kept(self) -> HeldTile:
        """All rows as one tile, decoded at the first scan."""
        if self.memory.tile is None:
            decoded = torch.empty(self.count, self.rows.layout.width, dtype=self.dtype)
            lengthened: list[Tensor] = []
            start = 0
            for tile in self._streamed():
                decoded[start : start + len(tile)] = tile.values
                if (own := tile.lengthened) is not None:  # of all tiles, or of none
                    lengthened.append(own)
                start += len(tile)
            self.memory.tile = HeldTile(self.positions(), decoded, torch.cat(lengthened) if lengthened else None)
        return self.memory.tile

    def _streamed(self) -> Iterator[Tile]:
        return self.tiles_at(self.positions())

    def tiles_at(self, positions: Tensor) -> Iterator[Tile]:
        """Yield the rows at ascending ``positions``, whichever are wanted."""
        gradients = self.rows.gradients
        chunks = self.rows.chunks() if len(positions) == len(self.rows) else gradients.selected(positions.numpy())
        if not gradients.mapped:
            chunks = ahead(chunks)
        for chunk in chunks:
            yield ChunkTile(positions[chunk.start : chunk.stop], chunk)


def _ignored(rows: int) -> None:
    """No bar is shown."""


def ahead(chunks: Iterator[RowChunk]) -> Iterator[RowChunk]:
    """The same chunks, of which the next ones are read by a thread while one is worked on."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        coming = deque(reader.submit(next, chunks, None) for _ in range(CHUNKS_AHEAD))
        try:
            while (chunk := coming.popleft().result()) is not None:
                coming.append(reader.submit(next, chunks, None))
                yield chunk
        finally:
            for future in coming:
                future.cancel()
