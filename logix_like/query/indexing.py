"""Answers by an index: candidates by FAISS, scores from the store, and what share of the true answer was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from logix_like.query.fitting import Recent
from logix_like.query.index import POOL, SCANNED, SMALLEST_POOL, RowIndex, Vectors
from logix_like.query.keeping import IndexKey, index_for
from logix_like.query.scoring import Sides, Task, exact_extremes, extremes_among

MEASURED_QUERIES = 32
"""The recall is measured on so many of the queries that are asked first; half of them choose the pool."""
WANTED_RECALL = 0.99
"""With less on the choosing queries, twice as many candidates are named: above what is to be told, as a margin."""
SHARE_OF_EACH = 1 / 25
"""With more candidates than this share of the rows, for one query, every row is scored: a row that is fetched by itself
costs about as much as scanning ten."""
SHARE_OF_ALL = 1 / 4
"""The same for the candidates of all queries together: a scan costs less for each of many queries, while fetching costs
each the same. (64 queries with an eighth of 100,000 rows for candidates took a third of the exact engine's time.)"""
MOST_SEARCHED = 12
"""With more queries every row is scored where FAISS itself searches, which costs each query the same."""


@dataclass(frozen=True)
class Measured:
    """What was found out of an index, for one way of asking."""

    count: int
    """Candidates for each side of a query."""
    told: str
    """Its recall, in words."""


class IndexSearch:
    """Keeps the two indexes that were asked last, and what was measured of them."""

    def __init__(self) -> None:
        self._indexes: Recent[RowIndex] = Recent(2)

    def extremes(
        self,
        task: Task,
        k: int,
        key: IndexKey,
        rows: str,
        cache: Path | None,
        vectors: Callable[[], Vectors],
    ) -> tuple[Sides, str]:
        """The ``k`` highest and lowest, and a remark for the answer's note.

        Args:
            task: The question.
            k: Samples on each side.
            key: What the index depends on, but for the rows.
            rows: Identifies the rows.
            cache: Where indexes of this store are kept; None to keep them in memory alone.
            vectors: Gives the rows to index.
        """
        remark = slower_than_exact(task, max(POOL * k, SMALLEST_POOL), key.factory)
        if remark:
            return exact_extremes(task, k), remark
        index = self._indexes.get((key, rows), lambda: index_for(vectors(), key, cache))
        # Two queries tell less than twenty: a recall is measured again where there are many more to measure it on.
        size = min(len(task.scorer.queries), MEASURED_QUERIES).bit_length()
        measured = index.measured.get((k, task.candidates.chosen, size), lambda: self._measured(task, k, index))
        remark = slower_than_exact(task, measured.count, key.factory)
        if remark:
            return exact_extremes(task, k), remark
        named = _named(task, measured.count, index)
        if _too_few(named, k):
            return exact_extremes(task, k), f"the index {key.factory} named too few rows: every row was scored"
        return extremes_among(task, torch.cat(named, dim=1), k), f"index {key.factory}, {measured.told}"

    def _measured(self, task: Task, k: int, index: RowIndex) -> Measured:
        """How many candidates are named, chosen on some of the queries, and their recall on others."""
        some, alone = _first_queries(task), _first_queries(task, 1)
        truth, rows = exact_extremes(some, k), task.candidates.count
        choosing, telling = slice(0, None, 2), slice(1, None, 2)
        count = min(rows, max(POOL * k, SMALLEST_POOL))
        found = _recalls(_named(some, count, index), truth)
        while found[choosing].mean() < WANTED_RECALL and count < rows:
            if slower_than_exact(alone, 2 * count, index.factory):
                break
            count = min(rows, 2 * count)
            found = _recalls(_named(some, count, index), truth)
        if len(found) == 1:
            return Measured(count, f"recall@{k} {float(found):.3f} of the query that it was set up with")
        others = found[telling]
        return Measured(count, f"recall@{k} {_with_error(others)} on queries apart from those it was set up with")


def slower_than_exact(task: Task, count: int, factory: str) -> str:
    """Why every row should be scored rather than ``count`` candidates for each side of each query; empty if not."""
    queries, rows = len(task.scorer.queries), task.candidates.count
    if queries > MOST_SEARCHED and factory not in SCANNED:
        return f"every row was scored: for {queries:,} queries an index {factory} would be slower"
    if 2 * count <= min(SHARE_OF_EACH, SHARE_OF_ALL / queries) * rows:
        return ""
    named = f"{2 * count:,} candidates for {'the query' if queries == 1 else f'each of {queries:,} queries'}"
    return f"every row was scored: with {named} among {rows:,} rows an index would be slower"


def _named(task: Task, count: int, index: RowIndex) -> tuple[Tensor, Tensor]:
    wanted = None if task.candidates.complete else task.candidates.wanted
    return index.candidates(task.scorer.queries, count, wanted)


def _too_few(named: tuple[Tensor, Tensor], k: int) -> bool:
    return any(int((side >= 0).sum(1).min()) < k for side in named)


def _first_queries(task: Task, count: int = MEASURED_QUERIES) -> Task:
    scorer = task.scorer
    return replace(
        task, scorer=replace(scorer, queries=scorer.queries[:count], query_lengths=scorer.query_lengths[:count])
    )


def _recalls(named: tuple[Tensor, Tensor], truth: Sides) -> Tensor:
    """``[queries]``: the share of the true extremes of both sides that is among the candidates."""
    shares = [_shared(found, true.positions) for found, true in zip(named, truth, strict=True)]
    return torch.stack(shares).mean(0)


def _shared(found: Tensor, true: Tensor) -> Tensor:
    """``[queries]``."""
    return torch.stack([torch.isin(a, b).double().mean() for a, b in zip(true, found, strict=True)])


def _with_error(recalls: Tensor) -> str:
    """The mean and, where there are enough to tell, how far it may be off."""
    if len(recalls) < 4:
        return f"{float(recalls.mean()):.3f} (few queries: {len(recalls)})"
    return f"{float(recalls.mean()):.3f} ± {float(recalls.std()) / len(recalls) ** 0.5:.3f} ({len(recalls)} queries)"
