"""Answering queries from a store: which rows, which preconditioner, which way of scoring, which engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logix_like.errors import EmptyStoreError, ModelMismatchError, QueryError
from logix_like.layout import DataId
from logix_like.preconditioner import FittedPreconditioner, require_preconditioner
from logix_like.query.completion import QueryStore
from logix_like.query.fitting import Fit, Fitter, Recent
from logix_like.query.gradients import QueryGradients
from logix_like.query.index import FlatIndex
from logix_like.query.modes import MODES
from logix_like.query.result import Ids, InfluenceResult, Ranking, SelfInfluence, is_count
from logix_like.query.scan import Candidates
from logix_like.query.scoring import Extremes, Task, every_score, exact_extremes, indexed_extremes

REDUCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "mean": "samples, each the mean of its visits",
        "sum": "samples, each the sum of its visits",
        "last": "samples, each its last visit",
        "none": "visits, each by itself",
    }
)
"""How visits of one sample are combined, in words."""

ENGINES = ("exact", "faiss")
"""``exact`` reads every row; ``faiss`` asks an index in memory and scores its candidates exactly."""


KEPT_BYTES = 32 * 2**20
"""How much of a small store is kept in memory, decoded, from one question to the next."""

Steps = NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """The options of a query; a wrong one is a :class:`QueryError` that lists the right ones."""

    k: int | None
    preconditioner: str
    damping: float
    mode: str
    reduce: str
    engine: str

    def __post_init__(self) -> None:
        """Check every option that needs no store to be checked."""
        require_preconditioner(self.preconditioner, self.damping)
        for what, name, known in (
            ("mode", self.mode, tuple(MODES)),
            ("reduce", self.reduce, tuple(REDUCTIONS)),
            ("engine", self.engine, ENGINES),
        ):
            if name not in known:
                raise QueryError(f"unknown {what} {name!r}; known: {', '.join(known)}")
        if self.k is not None and not is_count(self.k):
            raise QueryError(f"k is {self.k!r}; it must be a whole number, or None for the scores of all samples")
        if self.k is not None and self.k < 1:
            raise QueryError(f"k is {self.k}; it must be at least 1, or None for the scores of all samples")
        if self.k is None and self.engine == "faiss":
            raise QueryError("engine='faiss' finds the first k only: give k=, or ask with engine='exact'")


class QueryEngine:
    """Answers queries from the rows and statistics of a store; needs no model.

    Preconditioners, self-influences and indexes are kept from call to call, as long as the rows and the
    settings they were made for are the ones asked for.

    Args:
        store: The store to ask.
        keep_bytes: When all rows together take no more memory than this once decoded, they are kept, so that
            asking a small store again is one matrix product. Larger stores are read anew for each question.
    """

    def __init__(self, store: QueryStore, *, keep_bytes: int = KEPT_BYTES) -> None:
        self._store = store
        self._keep_bytes = keep_bytes
        self._fitter = Fitter(store)
        self._candidates: Recent[Candidates] = Recent(2)
        self._lengths: Recent[Tensor] = Recent(4)
        self._indexes: Recent[FlatIndex] = Recent(1)

    def influence(
        self,
        query: QueryGradients,
        *,
        k: int | None = None,
        preconditioner: str = "auto",
        damping: float = 0.1,
        mode: str = "dot",
        reduce: str = "mean",
        engine: str = "exact",
        data_id: Sequence[DataId] | None = None,
        progress: bool | None = None,
    ) -> InfluenceResult:
        """Score every sample of the store for every query: ``g_q^T (F + lambda I)^-1 g_i``.

        A positive score means that training on the sample lowered the query's loss (a proponent, helpful);
        negative, that it raised it (an opponent, harmful).

        Args:
            query: What to ask with; its gradients are not changed.
            k: Hold only the k highest and the k lowest scores of each query: memory then does not grow with
                the store. None holds all scores.
            preconditioner: A key of :data:`logix_like.preconditioner.PRECONDITIONERS`.
            damping: lambda as a multiple of the mean eigenvalue of each module's block.
            mode: A key of :data:`logix_like.query.modes.MODES`.
            reduce: A key of :data:`REDUCTIONS`.
            engine: One of :data:`ENGINES`.
            data_id: Rank only the samples with these ids; the result has them in the store's order.
            progress: Show a progress bar: always, never, or (None) on a terminal when it takes long.

        Raises:
            QueryError: an option, an id or a query makes no sense.
            ModelMismatchError: the queries' modules or projections are not the store's.
            EmptyStoreError: the store has no row to rank.
            StatisticsError: a statistic is missing and cannot be computed, or a block is singular.
        """
        question = Question(k, preconditioner, damping, mode, reduce, engine)
        candidates = self._select(reduce, data_id)
        self._require_answerable(query, candidates)
        if k is not None and k > candidates.count:
            raise QueryError(f"k is {k}, but there are only {candidates.count} samples to rank; ask for fewer")
        fit = self._fitter.fit(preconditioner, damping, progress)
        task = self._task(question, query, candidates, fit, progress)
        return InfluenceResult(
            query_id=tuple(query.data_id),
            samples=candidates.count,
            mode=mode,
            preconditioner=preconditioner,
            damping=damping,
            reduce=reduce,
            engine=engine,
            note=self._note(question, candidates, fit, query),
            source=str(getattr(self._store, "path", "")),
            **self._answer(question, task, fit),
        )

    def self_influence(
        self,
        query: QueryGradients | None = None,
        *,
        preconditioner: str = "auto",
        damping: float = 0.1,
        reduce: str = "mean",
        data_id: Sequence[DataId] | None = None,
        progress: bool | None = None,
    ) -> SelfInfluence:
        """``g^T (F + lambda I)^-1 g`` of each sample of the store, or of each of ``query``'s gradients.

        Options and errors are those of :meth:`influence`.
        """
        question = Question(None, preconditioner, damping, "dot", reduce, "exact")
        candidates = self._select(reduce, data_id)
        if query is not None:
            self._require_answerable(query, candidates)
        fit = self._fitter.fit(preconditioner, damping, progress)
        note = self._note(question, candidates, fit, query)
        if query is not None:
            gradients = query.gradients.detach().to("cpu", candidates.dtype)
            scores = _squared_lengths(gradients, fit.preconditioner)
            return SelfInfluence(_id_array(query.data_id), scores, preconditioner, damping, reduce, note)
        factor = _factor(candidates)
        positions = candidates.positions()
        scores = self._row_lengths(candidates, fit, progress)[positions]
        scores = scores if factor is None else scores * factor[positions].square()
        ids, step = _labels(candidates, positions, reduce)
        return SelfInfluence(ids, scores, preconditioner, damping, reduce, note, step)

    def preconditioner(self, name: str = "auto", damping: float = 0.1) -> FittedPreconditioner:
        """The preconditioner that a query with these settings uses; fitted now if it was not yet."""
        require_preconditioner(name, damping)
        self._require_rows()
        return self._fitter.fit(name, damping, None).preconditioner

    def _require_rows(self) -> None:
        if not len(self._store):
            raise EmptyStoreError(
                "the store holds no rows: log some samples and commit them (run.commit() or run.finalize()) "
                "before asking"
            )

    def _require_answerable(self, query: QueryGradients, candidates: Candidates) -> None:
        if not isinstance(query, QueryGradients):
            raise QueryError(
                f"the query is a {type(query).__name__}; it must be QueryGradients: those of 'with run.query(...) as "
                "q' are q.gradients, saved ones come from QueryGradients.load(...)"
            )
        if query.layout != candidates.rows.layout:
            candidates.rows.layout.require_same(query.layout)
        known = self._store.projections_digest if query.projections else ""
        if known and query.projections != known:
            raise ModelMismatchError(
                f"the queries were projected with other matrices ({query.projections}) than the rows ({known}): "
                "another seed or another basis, so that no number of theirs means the same; capture the queries with "
                "the store's projections (resume the run, or load them from the store)"
            )
        query.require_answerable()

    def _select(self, reduce: str, data_id: Sequence[DataId] | None) -> Candidates:
        self._require_rows()
        candidates = self._candidates.get(
            (self._store.key, reduce), lambda: Candidates.valid(self._store.view(reduce), self._keep_bytes)
        )
        if data_id is None:
            return candidates
        if not isinstance(data_id, str | int | Iterable):
            raise QueryError(f"data_id is {data_id!r}; it must be a list of the ids (str or int) to rank")
        return candidates.restrict([data_id] if isinstance(data_id, str | int) else list(data_id))

    def _task(
        self,
        question: Question,
        query: QueryGradients,
        candidates: Candidates,
        fit: Fit,
        progress: bool | None,
    ) -> Task:
        mode, factor = MODES[question.mode], _factor(candidates)
        gradients = query.gradients.detach().to("cpu", candidates.dtype)
        preconditioned = fit.preconditioner.apply(gradients)
        query_lengths = lengths = torch.empty(0)
        if mode.uses_lengths:
            query_lengths = (gradients * preconditioned).sum(dim=1)
            lengths = self._row_lengths(candidates, fit, progress)
            lengths = lengths if factor is None else lengths * factor.square()
        return Task(candidates, mode, preconditioned, query_lengths, lengths, factor, progress)

    def _answer(self, question: Question, task: Task, fit: Fit) -> dict[str, Any]:
        """The fields of a result that hold scores."""
        candidates, k, reduce = task.candidates, question.k, question.reduce
        if k is None:
            ids, step = _labels(candidates, candidates.positions(), reduce)
            return {"data_id": ids, "scores": every_score(task), "step": step}
        if question.engine == "faiss":
            top, bottom = indexed_extremes(task, self._index(question, task, fit), k)
        else:
            top, bottom = exact_extremes(task, k)
        return {"top": _ranking(candidates, top, reduce), "bottom": _ranking(candidates, bottom, reduce)}

    def _row_lengths(self, candidates: Candidates, fit: Fit, progress: bool | None) -> Tensor:
        """``[rows]``: squared lengths of the rows themselves, 0 for those that are not wanted."""

        def compute() -> Tensor:
            lengths = torch.zeros(len(candidates.rows), dtype=candidates.dtype)
            with candidates.buffer() as buffer:
                for tile in candidates.tiles(progress, "self-influence"):
                    for start, stop, values in tile.pieces(buffer):
                        lengths[tile.positions[start:stop]] = _squared_lengths(values, fit.preconditioner)
            return lengths

        if not candidates.complete:
            return compute()
        return self._lengths.get((candidates.rows.key, fit.key), compute)

    def _index(self, question: Question, task: Task, fit: Fit) -> FlatIndex:
        """The index of all valid rows, whichever of them are asked for."""
        every = self._select(question.reduce, None)

        def build() -> FlatIndex:
            lengths = torch.zeros(len(every.rows), dtype=every.dtype)
            if task.mode.uses_lengths:
                lengths = self._row_lengths(every, fit, task.progress)
                lengths = lengths if task.factor is None else lengths * task.factor.square()
            return FlatIndex(every, task.mode, lengths, task.factor, task.progress)

        return self._indexes.get((every.rows.key, question.reduce, fit.key, question.mode), build)

    def _note(self, question: Question, candidates: Candidates, fit: Fit, query: QueryGradients | None) -> str:
        parts = [
            f"{candidates.count:,} {REDUCTIONS[question.reduce]}",
            f"{question.mode} score" if query is not None else "self-influence",
            fit.described,
            f"{question.engine} engine",
        ]
        left_out = len(self._store) - fit.rows
        if left_out:
            parts.append(f"{left_out:,} stored rows left out (not finite, or superseded)")
        if self._store.damaged_rows:
            parts.append(f"{self._store.damaged_rows:,} stored rows left out (their files are damaged)")
        return "; ".join(parts + ([f"queries: {query.note}"] if query is not None and query.note else []))


def _squared_lengths(rows: Tensor, preconditioner: FittedPreconditioner) -> Tensor:
    """``[n]``: ``g^T F^-1 g`` of ``rows [n, width]``; rounding makes none negative."""
    return (rows * preconditioner.apply(rows)).sum(dim=1).clamp_min(0)


def _factor(candidates: Candidates) -> Tensor | None:
    factor = candidates.rows.factor
    return None if factor is None else torch.as_tensor(factor).to(candidates.dtype)


def _id_array(ids: Sequence[DataId]) -> Ids:
    array = np.empty(len(ids), dtype=object)
    array[:] = list(ids)
    return array


def _labels(candidates: Candidates, positions: Tensor, reduce: str) -> tuple[Ids, Steps | None]:
    """Ids, and for single visits the steps, of the rows at ``positions`` (of any shape)."""
    flat, shape = positions.flatten().numpy(), tuple(positions.shape)
    ids = np.asarray(candidates.rows.data_id[flat], dtype=object).reshape(shape)
    if reduce != "none":
        return ids, None
    return ids, np.asarray(candidates.rows.step[flat], dtype=np.int64).reshape(shape)


def _ranking(candidates: Candidates, extremes: Extremes, reduce: str) -> Ranking:
    ids, step = _labels(candidates, extremes.positions, reduce)
    return Ranking(ids, extremes.scores, step)
