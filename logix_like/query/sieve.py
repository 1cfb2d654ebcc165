"""The k highest and lowest scores of a stream, exact though the stream's own scores are rounded.

A scan multiplies in the fastest arithmetic there is, whose rounding errors are bounded. Rows that could be among the
k by these bounds, and only they, are multiplied again in float64 while their chunk is at hand: by a product of matrices
where they are many, and those that it leaves one at a time, so that equal rows have equal scores. So the answer is that
of float64 products of the stored rows, whatever the scan's arithmetic or the cutting into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from logix_like.query.modes import Mode
from logix_like.query.products import Approximate, row_products
from logix_like.query.ranking import RunningTop
from logix_like.query.scan import Tile

EXACT_BYTES = 2 * 2**20
"""Rows are multiplied again so many bytes (float64) at a time."""
OPEN = 8
"""Where more than so many times ``k`` rows of a query pass, these are looked at again by float64 products."""
SMALLEST_NORM = 1e-18
"""Norms below are not told apart: squares underflow in float32."""


@dataclass(frozen=True, eq=False)
class Scorer:
    """Turns exact products into scores, for pairs of a query and a row."""

    mode: Mode
    queries: Tensor
    """``[queries, width]``, preconditioned."""
    query_lengths: Tensor
    """``[queries]``, squared lengths, float64; not read in a mode that does not use them."""
    row_lengths: Tensor
    """``[rows]``, squared lengths, times ``factor`` squared, float64; not read in a mode that does not use them."""
    factor: Tensor | None
    """``[rows]``: what each row is multiplied by; None for 1."""

    def scores(self, products: Tensor, positions: Tensor, queries: Tensor | None = None) -> Tensor:
        """``[queries, n]`` from products of that shape, for the rows at ``positions [n]``.

        With numbers ``queries [n]``: ``[n]`` from the products of such pairs of a query and a row.
        """
        if self.factor is not None:
            products = products * self.factor[positions].to(products)
        if not self.mode.uses_lengths:
            return products
        query_lengths = self.query_lengths[:, None] if queries is None else self.query_lengths[queries]
        return self.mode.scores(products, query_lengths, self.row_lengths[positions])

    def weight(self, queries: Tensor, positions: Tensor) -> Tensor:
        """What products of pairs are multiplied by, float64, in a mode whose scores are proportional to them.

        ``queries`` and ``positions`` are numbers of queries and rows, of shapes that fit each other.
        """
        weight = torch.ones(torch.broadcast_shapes(queries.shape, positions.shape), dtype=torch.float64)
        if self.factor is not None:
            weight = weight * self.factor[positions].double()
        if not self.mode.uses_lengths:
            return weight
        return weight * self.mode.slope(self.query_lengths[queries], self.row_lengths[positions])

    def slack(self, found: Approximate, norms: Tensor, positions: Tensor) -> Tensor:
        """``[queries]``: how far the scores of the rows at ``positions``, of these ``norms``, can be off.

        The share of the score itself by which narrow products are rounded is not in it.
        """
        gain = torch.ones(1) if self.factor is None else self.factor[positions].abs().double()
        outer = torch.ones(1)
        if self.mode.uses_lengths:
            gain = gain * self.mode.slope(torch.ones(1), self.row_lengths[positions])
            outer = self.mode.slope(self.query_lengths, torch.ones(1))
        underflow = self.queries.shape[1] * torch.finfo(torch.float32).tiny
        slack = (found.absolute * (gain * norms).max() + underflow * gain.max()) * outer
        if self.mode.proportional:
            return slack
        # The lengths themselves are rounded, and with them every score that they enter.
        return slack + torch.finfo(torch.float32).eps * 4 * (self.query_lengths + self.row_lengths[positions].max())


@dataclass(eq=False)
class Group:
    """Tiles that are sieved together."""

    tiles: list[Tile] = field(default_factory=list)
    products: list[Approximate] = field(default_factory=list)
    rows: int = 0

    def add(self, tile: Tile, products: Approximate) -> None:
        """Take in one more tile."""
        self.tiles.append(tile)
        self.products.append(products)
        self.rows += len(tile)

    @property
    def positions(self) -> Tensor:
        """``[n]``, where the rows stand."""
        return torch.cat([tile.positions for tile in self.tiles])

    @property
    def lengthened(self) -> Tensor:
        """``[n]``: how far rounding can have lengthened the rows."""
        parts = ((tile.lengthened, len(tile)) for tile in self.tiles)
        return torch.cat([torch.zeros(count) if part is None else part for part, count in parts])

    def take(self, columns: Tensor) -> Tensor:
        """The rows of ascending ``columns [m]`` of the group, decoded, ``[m, width]``."""
        edges = np.cumsum([0, *(len(tile) for tile in self.tiles)])
        numbers = columns.numpy()
        cuts = np.searchsorted(numbers, edges)
        parts = [
            tile.take(numbers[low:high] - edge)
            for tile, edge, low, high in zip(self.tiles, edges[:-1], cuts[:-1], cuts[1:], strict=True)
            if low < high
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Sieve:
    """Keeps the exact ``k`` highest and ``k`` lowest of groups of rows; the first group has at least ``k``."""

    def __init__(self, scorer: Scorer, norms: Tensor, k: int, close: Callable[[Tensor], Approximate]) -> None:
        """``norms [rows]`` are the rows' norms before they were rounded to be stored, float64.

        ``close`` multiplies decoded rows with the queries as closely as a product of matrices can.
        """
        self._scorer = scorer
        self._close = close
        self._norms = norms
        self._queries = scorer.queries.double()
        self._k = k
        self.highest = RunningTop(k, largest=True)
        self.lowest = RunningTop(k, largest=False)

    def update(self, group: Group) -> None:
        """Take in rows that follow all those before."""
        passing = self._passing(group, torch.arange(group.rows), group.products)
        if int(passing.sum()) > OPEN * self._k * len(passing):
            columns = passing.any(dim=0).nonzero().flatten()
            passing[:, columns] &= self._passing(group, columns, [self._close(group.take(columns))])
        self.take_in(group, passing, group.positions)

    def _passing(self, group: Group, columns: Tensor, found: Sequence[Approximate]) -> Tensor:
        """``[queries, n]``: which of the rows of these ``columns [n]`` could be among the k, by what was found."""
        positions = group.positions[columns]
        products = torch.cat([part.values for part in found]).T
        products = products.to(torch.promote_types(products.dtype, self._scorer.queries.dtype)).contiguous()
        scores = self._scorer.scores(products, positions)
        norms = self._norms[positions] + group.lengthened[columns]
        slack = self._slack(found, norms, positions, scores.dtype)
        relative = max(part.relative for part in found)

        def lower(least: Tensor) -> Tensor:
            return least - 1.01 * (least.abs() * relative + slack)

        passing = torch.zeros_like(scores, dtype=torch.bool)
        for running, sign in ((self.highest, 1), (self.lowest, -1)):
            signed = scores if sign > 0 else -scores
            least = running.threshold
            if least is None:  # the k-th best of these is no better than its bound
                known = torch.where(signed.isfinite(), signed, -torch.inf)
                least = lower(known.topk(self._k, dim=1).values[:, -1].double())
            passing |= ~(signed < lower(least).to(scores.dtype)[:, None])  # so that what is not a number passes
        return passing

    def _slack(self, found: Sequence[Approximate], norms: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """``[queries]``: how far a score of the rows can be off, its own rounding aside."""
        bounds = {id(part.absolute): part for part in found}  # one, or two where tiles differ
        slacks = [self._scorer.slack(part, norms, positions) for part in bounds.values()]
        # A bound that is itself rounded to ``dtype`` must not become a larger one.
        return torch.stack(slacks).amax(0) + torch.finfo(dtype).tiny

    def take_in(self, group: Group, passing: Tensor, positions: Tensor) -> None:
        """Score those pairs of a query and a row of ``group`` exactly where ``passing [queries, n]`` holds."""
        queries, columns = passing.nonzero(as_tuple=True)
        if not len(queries):
            return
        scores = self._exact(group, queries, columns, positions)
        counts = passing.sum(dim=1)
        place = torch.arange(len(queries)) - (counts.cumsum(0) - counts)[queries]
        for running, sign in ((self.highest, 1), (self.lowest, -1)):
            padded = torch.full((len(passing), int(counts.max())), -sign * torch.inf, dtype=torch.float64)
            where = torch.zeros_like(padded, dtype=torch.int64)
            padded[queries, place], where[queries, place] = scores, positions[columns]
            running.update(padded, where)

    def _exact(self, group: Group, queries: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
        """``[pairs]``: exact scores of pairs, ordered by query and then by column."""
        rows, inverse = columns.unique(return_inverse=True)
        decoded = group.take(rows)
        products = torch.empty(len(columns), dtype=torch.float64)
        piece = max(1, EXACT_BYTES // (8 * decoded.shape[1]))
        for start in range(0, len(columns), piece):
            some = slice(start, start + piece)
            products[some] = row_products(decoded[inverse[some]], self._queries[queries[some]])
        return self._scorer.scores(products, positions[columns], queries)
