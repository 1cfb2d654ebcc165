"""Scores of the rows for the queries: every one, or only the highest and the lowest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from logix_like.query.index import FlatIndex
from logix_like.query.modes import Mode
from logix_like.query.ranking import RunningTop, stable_top
from logix_like.query.scan import Candidates, Tile

RANKED_AT_ONCE = 4096
"""The scores of so many rows are collected before the highest and lowest are picked out of them."""


@dataclass(frozen=True, eq=False)
class Task:
    """One question, ready to be answered."""

    candidates: Candidates
    """The rows that are ranked."""
    mode: Mode
    queries: Tensor
    """``[queries, width]``, preconditioned."""
    query_lengths: Tensor
    """``[queries]``, squared lengths; not read in a mode that does not use them."""
    row_lengths: Tensor
    """``[rows]``, squared lengths, times ``factor`` squared; not read in a mode that does not use them."""
    factor: Tensor | None
    """``[rows]``: what each row is multiplied by; None for 1."""
    progress: bool | None

    def scores(self, tile: Tile) -> Tensor:
        """``[queries, n]`` for the rows of ``tile``."""
        products = self._products(tile).T.contiguous()
        if self.factor is not None:
            products *= self.factor[tile.positions]
        if not self.mode.uses_lengths:
            return products
        return self.mode.scores(products, self.query_lengths, self.row_lengths[tile.positions])

    def _products(self, tile: Tile) -> Tensor:
        """``[n, queries]``; rows as the left factor is the faster order when there are few queries."""
        if tile.held is not None:
            return torch.mm(tile.held, self.queries.T)
        products = torch.empty(len(tile), len(self.queries), dtype=self.queries.dtype)
        with self.candidates.buffer() as buffer:
            for start, stop, values in tile.pieces(buffer):
                torch.mm(values, self.queries.T, out=products[start:stop])
        return products


@dataclass(frozen=True, eq=False)
class Extremes:
    """The most extreme rows of each query on one side."""

    scores: Tensor
    """``[queries, k]``."""
    positions: Tensor
    """``[queries, k]``."""


def every_score(task: Task) -> Tensor:
    """``[queries, candidates]`` in row order."""
    scores = torch.empty(len(task.queries), task.candidates.count, dtype=task.queries.dtype)
    start = 0
    for tile in task.candidates.tiles(task.progress, "influence"):
        scores[:, start : start + len(tile)] = task.scores(tile)
        start += len(tile)
    return scores


def exact_extremes(task: Task, k: int) -> tuple[Extremes, Extremes]:
    """The ``k`` highest and the ``k`` lowest in one pass over the rows, in bounded memory."""
    highest, lowest = RunningTop(k, largest=True), RunningTop(k, largest=False)
    for scores, positions in _gathered(task):
        highest.update(scores, positions)
        lowest.update(scores, positions)
    return Extremes(*highest.result()), Extremes(*lowest.result())


def _gathered(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scores and positions of :data:`RANKED_AT_ONCE` rows or a few more."""
    held: list[tuple[Tensor, Tensor]] = []
    rows = 0
    for tile in task.candidates.tiles(task.progress, "influence"):
        held.append((task.scores(tile), tile.positions))
        rows += len(tile)
        if rows >= RANKED_AT_ONCE:
            yield _joined(held)
            held, rows = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(held) == 1:
        return held[0]
    return torch.cat([scores for scores, _ in held], dim=1), torch.cat([positions for _, positions in held])


def indexed_extremes(task: Task, index: FlatIndex, k: int) -> tuple[Extremes, Extremes]:
    """The ``k`` highest and the ``k`` lowest among the candidates that ``index`` names, scored exactly."""
    wanted = None if task.candidates.complete else task.candidates.wanted
    highest, lowest = index.candidates(task.queries, k, wanted)
    return _rescored(task, highest, k, 1), _rescored(task, lowest, k, -1)


def _rescored(task: Task, positions: Tensor, k: int, sign: int) -> Extremes:
    """Rank each query's ``positions [queries, c]`` by their exact scores; ``sign`` -1 for the lowest."""
    found = []
    for query, own in enumerate(positions.sort(dim=1).values):  # row order, in which ties are broken
        tile = task.candidates.fetch(own)
        scores, chosen = stable_top(sign * task.scores(tile)[query : query + 1], k)
        found.append((sign * scores, own[chosen]))
    return Extremes(torch.cat([s for s, _ in found]), torch.cat([p for _, p in found]))
