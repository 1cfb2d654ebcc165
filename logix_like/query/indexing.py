"""Answers by an index: candidates by FAISS, scores from the store, and what share of the true answer was found."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from logix_like.query.fitting import Recent
from logix_like.query.index import RowIndex, Vectors
from logix_like.query.keeping import IndexKey, index_for
from logix_like.query.scoring import Sides, Task, exact_extremes, indexed_extremes

MEASURED_QUERIES = 8
"""Recall is measured on so many of the queries that are asked first."""
WANTED_RECALL = 0.98
"""With less, twice as many candidates are scored."""


class IndexSearch:
    """Keeps the index that was asked last, and what was measured of it."""

    def __init__(self) -> None:
        self._indexes: Recent[RowIndex] = Recent(1)

    def extremes(
        self,
        task: Task,
        k: int,
        way: Hashable,
        key: IndexKey,
        rows: str,
        cache: Path | None,
        vectors: Callable[[], Vectors],
    ) -> tuple[Sides, str]:
        """The ``k`` highest and lowest, and a remark for the answer's note.

        Args:
            task: The question.
            k: Samples on each side.
            way: What a recall depends on beside ``k`` and the index: how queries are preconditioned.
            key: What the index depends on, but for the rows.
            rows: Identifies the rows.
            cache: Where indexes of this store are kept; None to keep them in memory alone.
            vectors: Gives the rows to index.
        """
        index = self._indexes.get((key, rows), lambda: index_for(vectors(), key, cache))
        recall = index.recall.get((k, way), lambda: self._measured(task, k, index))
        found = _found(task, k, index)
        if found is None:
            return exact_extremes(task, k), f"the index {key.factory} named too few rows: every row was scored"
        return found, f"index {key.factory}, recall@{k} {recall:.3f} measured on the first queries asked"

    def _measured(self, task: Task, k: int, index: RowIndex) -> float:
        """The recall on some of the queries; candidates are doubled while it is low and they are few."""
        some = _first_queries(task)
        truth = exact_extremes(some, k)
        recall = _recall(_found(some, k, index), truth)
        while recall < WANTED_RECALL and 8 * index.pool * k < task.candidates.count:
            index.pool *= 2
            recall = _recall(_found(some, k, index), truth)
        return recall


def _found(task: Task, k: int, index: RowIndex) -> Sides | None:
    """The best of the candidates, or None where they are fewer than ``k`` for some query."""
    wanted = None if task.candidates.complete else task.candidates.wanted
    named = index.candidates(task.scorer.queries, k, wanted)
    if any(int((side >= 0).sum(1).min()) < k for side in named):
        return None
    return indexed_extremes(task, *named, k)


def _first_queries(task: Task) -> Task:
    scorer = task.scorer
    lengths = scorer.query_lengths[:MEASURED_QUERIES]
    return replace(task, scorer=replace(scorer, queries=scorer.queries[:MEASURED_QUERIES], query_lengths=lengths))


def _recall(found: Sides | None, truth: Sides) -> float:
    """The share of the true extremes that were found, of both sides and all queries."""
    if found is None:
        return 1.0  # every row is scored then
    shares = [_shared(a.positions, b.positions) for a, b in zip(found, truth, strict=True)]
    return float(torch.cat(shares).mean())


def _shared(found: Tensor, true: Tensor) -> Tensor:
    """``[queries]``."""
    return (true[:, :, None] == found[:, None, :]).any(2).float().mean(1)
