"""Scores of the rows for the queries: every one, or only the highest and the lowest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from logix_like.query.parts import Parts
from logix_like.query.products import Products, row_products
from logix_like.query.ranking import RunningTop
from logix_like.query.scan import Candidates, Tile
from logix_like.query.sieve import SMALLEST_NORM, Group, Scorer, Sieve

SIEVED_ROWS = 16_384
"""The scores of at most so many rows (or one chunk more) are looked at together."""
SIEVED_SCORES = 2**24
"""The same for scores: with more queries there are fewer rows."""
SIEVED_BYTES = 128 * 2**20
"""The same for the rows' own bytes, decoded."""


@dataclass(frozen=True, eq=False)
class Task:
    """One question, ready to be answered."""

    candidates: Candidates
    """The rows that are ranked."""
    scorer: Scorer
    """The queries, and what a product means for them."""
    progress: bool | None

    @cached_property
    def products(self) -> Products:
        """What multiplies the rows with the queries."""
        return Products(self.candidates, self.scorer.queries, narrow=self.scorer.mode.proportional)

    def scores(self, tile: Tile) -> Tensor:
        """``[queries, n]`` for the rows of ``tile``, in the queries' precision."""
        return self.scorer.scores(self.products.exact(tile).T.contiguous(), tile.positions)

    @property
    def group_rows(self) -> int:
        """How many rows are sieved together."""
        scorer = self.scorer
        by_bytes = SIEVED_BYTES // (scorer.queries.shape[1] * scorer.queries.dtype.itemsize)
        return max(1, min(SIEVED_ROWS, SIEVED_SCORES // len(scorer.queries), by_bytes))


@dataclass(frozen=True, eq=False)
class Extremes:
    """The most extreme rows of each query on one side."""

    scores: Tensor
    """``[queries, k]``, float64: in fewer bits, rows of several ranges could not be told apart."""
    positions: Tensor
    """``[queries, k]``."""


Sides = tuple[Extremes, Extremes]
"""The highest and the lowest."""


def every_score(task: Task) -> Tensor:
    """``[queries, candidates]`` in row order."""
    scores = torch.empty(len(task.scorer.queries), task.candidates.count, dtype=task.scorer.queries.dtype)
    start = 0
    for tile in task.candidates.tiles(task.progress, "influence"):
        scores[:, start : start + len(tile)] = task.scores(tile)
        start += len(tile)
    return scores


def every_part(task: Task, parts: Parts) -> Tensor:
    """``[queries, candidates, parts]``: every score split by the parts of the model."""
    scorer = task.scorer
    shape = len(scorer.queries), task.candidates.count, len(parts.names)
    split = torch.empty(shape, dtype=scorer.queries.dtype)
    queries = torch.arange(shape[0])[:, None]
    start = 0
    with task.candidates.buffer() as buffer:
        for tile in task.candidates.tiles(task.progress, "influence"):
            for first, last, values in tile.pieces(buffer):
                where = slice(start + first, start + last)
                weight = scorer.weight(queries, tile.positions[first:last])
                split[:, where] = parts.products(values, scorer.queries) * weight[..., None].to(split.dtype)
            start += len(tile)
    return split


def parts_of_extremes(task: Task, side: Extremes, parts: Parts) -> Tensor:
    """``[queries, k, parts]``: the scores of ``side`` split by the parts of the model."""
    scorer, split = task.scorer, []
    for query, positions in enumerate(side.positions):
        rows, inverse = positions.unique(return_inverse=True)
        asked = scorer.queries[query : query + 1].double()
        products = parts.products(task.candidates.fetch(rows).double(), asked)[0]
        weight = scorer.weight(torch.full_like(rows, query), rows)
        split.append((products * weight[:, None])[inverse])
    return torch.stack(split).to(scorer.queries.dtype)


def exact_extremes(task: Task, k: int) -> Sides:
    """The ``k`` highest and the ``k`` lowest by float64 products, in one pass over the rows, in bounded memory."""
    if 8 * k > min(task.group_rows, task.candidates.count):  # a sieve would let most rows pass
        return _by_float64(task, k)
    group = Group()
    sieve: Sieve | None = None
    for tile in task.candidates.tiles(task.progress, "influence"):
        group.add(tile, task.products.of(tile))
        if group.rows >= task.group_rows:
            sieve = _sieved(sieve, group, task, k)
            group = Group()
    if group.rows:
        sieve = _sieved(sieve, group, task, k)
    assert sieve is not None
    return Extremes(*sieve.highest.result()), Extremes(*sieve.lowest.result())


def _by_float64(task: Task, k: int) -> Sides:
    """The same, every row multiplied in float64."""
    highest, lowest = RunningTop(k, largest=True), RunningTop(k, largest=False)
    queries = task.scorer.queries.double()
    with task.candidates.buffer() as buffer:
        for tile in task.candidates.tiles(task.progress, "influence"):
            products = torch.empty(len(queries), len(tile), dtype=torch.float64)
            for start, stop, values in tile.pieces(buffer):
                exact = values.double()
                for line, query in zip(products, queries, strict=True):
                    line[start:stop] = row_products(exact, query)
            scores = task.scorer.scores(products, tile.positions)
            for side in (highest, lowest):
                side.update(scores, tile.positions)
    return Extremes(*highest.result()), Extremes(*lowest.result())


def _sieved(sieve: Sieve | None, group: Group, task: Task, k: int) -> Sieve:
    sieve = _sieve(task, k) if sieve is None else sieve
    sieve.update(group)
    return sieve


def _sieve(task: Task, k: int) -> Sieve:
    norms = torch.as_tensor(task.candidates.rows.norm).double().clamp_min(SMALLEST_NORM)
    return Sieve(task.scorer, norms, k, task.products.close)


def extremes_among(task: Task, named: Tensor, k: int) -> Sides:
    """The ``k`` highest and the ``k`` lowest of each query among rows of its own, scored in float64.

    ``named [queries, n]`` are their positions, at least ``k`` different ones; -1 stands for none. A row is read once.
    """
    queries = torch.arange(len(named))[:, None].expand_as(named)[named >= 0]
    rows, columns = named[named >= 0].unique(return_inverse=True)
    sieve, start = _sieve(task, k), 0
    for tile in task.candidates.tiles_at(rows):
        here = (columns >= start) & (columns < start + len(tile))
        wanted = torch.zeros(len(named), len(tile), dtype=torch.bool)
        wanted[queries[here], columns[here] - start] = True
        sieve.take_in(Group([tile]), wanted, tile.positions)
        start += len(tile)
    return Extremes(*sieve.highest.result()), Extremes(*sieve.lowest.result())


def joined(parts: Iterator[Sides], k: int) -> Sides:
    """The extremes of several ranges of rows, in row order, from those of each."""
    highest, lowest = RunningTop(k, largest=True), RunningTop(k, largest=False)
    for top, bottom in parts:
        highest.update(top.scores, top.positions)
        lowest.update(bottom.scores, bottom.positions)
    return Extremes(*highest.result()), Extremes(*lowest.result())
