"""Products of rows and queries, in whichever arithmetic this machine is fastest in, with how far they can be off."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from logix_like.query.scan import Candidates, HeldTile, Tile

MEASURED_ROWS = 256
"""The two ways are compared on so many rows, once."""
NARROW_ROUNDING = 2.0**-8
"""A bfloat16 result is within this share of the exact one (its last bit, twice over)."""
FURTHER_ROUNDINGS = 8
"""Of each term beside those of its product and its sum: a row's scale and unit, and what makes a product a score."""

CLOSE_BYTES = 2 * 2**20
"""Rows are widened to float64 so many bytes at a time, which then stay in the caches."""


@dataclass(frozen=True, eq=False)
class Approximate:
    """Inner products ``p`` known within bounds: ``|values - p| <= relative |p| + absolute |row|``."""

    values: Tensor
    """``[n, queries]``."""
    relative: float
    absolute: Tensor
    """``[queries]``, for a row of norm 1."""


class Products:
    """Multiplies tiles with some queries.

    Rows that are stored in bfloat16 can be multiplied as they are (``narrow``) or widened to float32 first, a piece
    at a time (``wide``). Which is faster depends on the processor by a factor of ten either way, so it is measured.
    """

    def __init__(self, candidates: Candidates, queries: Tensor, *, narrow: bool = True) -> None:
        """``queries [queries, width]``; ``narrow=False`` leaves that way out."""
        self._candidates = candidates
        self._queries = queries
        self._allowed = narrow

    @cached_property
    def _narrow(self) -> Tensor:
        return self._queries.to(torch.bfloat16)

    @cached_property
    def _wide_error(self) -> Tensor:
        return self._error(self._queries.dtype)

    @cached_property
    def _close_error(self) -> Tensor:
        return self._error(torch.float64)

    def _error(self, dtype: torch.dtype) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self._queries.double(), dim=1)
        return norms * summation_error(self._queries.shape[1] + FURTHER_ROUNDINGS, dtype)

    @cached_property
    def _narrow_error(self) -> Tensor:
        dropped: Tensor = torch.linalg.vector_norm(self._queries.double() - self._narrow.double(), dim=1)
        return dropped + self._wide_error

    def exact(self, tile: Tile) -> Tensor:
        """``[n, queries]`` in the queries' own precision; rows as the left factor is faster for few queries."""
        if isinstance(tile, HeldTile):
            return torch.mm(tile.held, self._queries.T)
        return self._wide(tile, len(tile))

    def of(self, tile: Tile) -> Approximate:
        """The products, the fastest way; of rows that are kept, which are few, in float64."""
        if isinstance(tile, HeldTile):
            return self.close(tile.held)
        raw = tile.narrow if self._allowed else None
        if raw is not None and self._prefers_narrow(tile, raw):
            return Approximate(torch.mm(raw, self._narrow.T), NARROW_ROUNDING, self._narrow_error)
        return Approximate(self.exact(tile), 0.0, self._wide_error)

    def close(self, rows: Tensor) -> Approximate:
        """Those of decoded ``rows [n, width]`` by float64 arithmetic."""
        queries = self._queries.double()
        products = torch.empty(len(rows), len(queries), dtype=torch.float64)
        piece = max(1, CLOSE_BYTES // (8 * rows.shape[1]))
        buffer = torch.empty(min(piece, len(rows)), rows.shape[1], dtype=torch.float64)
        for start in range(0, len(rows), piece):
            values = rows[start : start + piece]
            torch.mm(buffer[: len(values)].copy_(values), queries.T, out=products[start : start + piece])
        return Approximate(products, 0.0, self._close_error)

    def _wide(self, tile: Tile, rows: int) -> Tensor:
        products = torch.empty(rows, len(self._queries), dtype=self._queries.dtype)
        # Rows of few bits have a unit for each coordinate: the queries take it over, once for a chunk.
        queries = self._queries if tile.units is None else self._queries * tile.units
        with self._candidates.buffer() as buffer:
            for start, stop, values in tile.pieces(buffer, rows, in_units=True):
                torch.mm(values, queries.T, out=products[start:stop])
        return products

    def _prefers_narrow(self, tile: Tile, raw: Tensor) -> bool:
        measured = self._candidates.memory.narrow
        size = len(self._queries).bit_length()
        if size not in measured:
            rows = min(len(tile), MEASURED_ROWS)
            wide = _seconds(lambda: self._wide(tile, rows))
            # An arithmetic that breaks its bounds (sums kept in bfloat16) is not used however fast it is.
            measured[size] = self._keeps_bounds(tile, raw, rows) and wide > _seconds(
                lambda: torch.mm(raw[:rows], self._narrow.T)
            )
        return measured[size]

    def _keeps_bounds(self, tile: Tile, raw: Tensor, rows: int) -> bool:
        values = tile.read(0, rows).double()
        exact = values @ self._queries.double().T
        bound = NARROW_ROUNDING * exact.abs() + torch.outer(values.norm(dim=1), self._narrow_error)
        return bool(((torch.mm(raw[:rows], self._narrow.T) - exact).abs() <= bound).all())


def row_products(rows: Tensor, queries: Tensor) -> Tensor:
    """``[n]``: float64 products of ``rows [n, width]`` with one query, or with one for each row.

    Those of equal rows are equal to the bit.

    Products of matrices sum in an order that depends on where a row stands, and on which rows stand beside it.
    """
    terms = rows.double() * queries
    if len(terms) == 1:  # alone, a long row would be summed by several threads
        terms = terms.repeat(2, 1)
    return terms.sum(dim=1)[: len(rows)]


def summation_error(roundings: int, dtype: torch.dtype) -> float:
    """``n u / (1 - n u)`` for ``n`` roundings and the unit roundoff ``u`` of ``dtype``.

    A computed inner product of ``n`` terms is within this share of ``|x|^T |y|``, at most both norms' product, of the
    exact one, in whatever order it is summed (Higham 2002, Accuracy and Stability of Numerical Algorithms, eq. 3.5).
    """
    share = roundings * torch.finfo(dtype).eps / 2
    return share / (1 - share)


def _seconds(act: Callable[[], object]) -> float:
    """The shortest of three runs after a first one, which pays for what is done once."""
    act()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return min(times)
