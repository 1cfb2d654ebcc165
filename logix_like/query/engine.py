"""Answering queries from a store: which rows, which preconditioner, which way of scoring, which engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from logix_like.damping import Damping, DampingSetting
from logix_like.errors import EmptyStoreError, QueryError
from logix_like.layout import DataId
from logix_like.preconditioner import FittedPreconditioner, require_preconditioner
from logix_like.query.completion import QueryStore, require_answerable
from logix_like.query.fitting import Fit, Fitter, Recent
from logix_like.query.gradients import QueryGradients
from logix_like.query.groups import GroupInfluence, named_groups, second_order, total_of
from logix_like.query.index import Vectors, require_factory
from logix_like.query.indexing import IndexSearch
from logix_like.query.keeping import IndexKey
from logix_like.query.labels import id_array, labels, ranking
from logix_like.query.lengths import RowLengths, squared_lengths
from logix_like.query.modes import MODES
from logix_like.query.parts import Parts, parts_of
from logix_like.query.question import REDUCTIONS, Question
from logix_like.query.result import InfluenceResult, SelfInfluence, is_count
from logix_like.query.scan import Candidates
from logix_like.query.scoring import (
    Extremes,
    Sides,
    Task,
    every_part,
    every_score,
    exact_extremes,
    parts_of_extremes,
)
from logix_like.query.selection import Where, select
from logix_like.query.sieve import Scorer

ALL_OF_FEWER = "; all that the filter leaves, fewer than k={}"
KEPT_BYTES = 32 * 2**20
"""How much of a small store is kept in memory, decoded, from one question to the next."""


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
        self._lengths = RowLengths()
        self._search = IndexSearch()

    def influence(
        self,
        query: QueryGradients,
        *,
        k: int | None = None,
        preconditioner: str = "auto",
        damping: DampingSetting = 0.1,
        mode: str = "dot",
        reduce: str = "mean",
        engine: str = "exact",
        where: Where | None = None,
        data_id: Sequence[DataId] | None = None,
        per: str | None = None,
        normalize: bool = False,
        client: object = None,
        index: str = "SQ8",
        progress: bool | None = None,
    ) -> InfluenceResult:
        """Score every sample of the store for every query: ``g_q^T (F + lambda I)^-1 g_i``.

        A positive score means that training on the sample lowered the query's loss (a proponent, helpful);
        negative, that it raised it (an opponent, harmful).

        Args:
            query: What to ask with; its gradients are not changed.
            k: Hold only the k highest and the k lowest scores of each query: memory then does not grow with
                the store. None holds all scores. Where ``where`` or ``data_id`` leave fewer than k samples, all of
                those are ranked, and the note says so; a k larger than the store is refused.
            preconditioner: A key of :data:`logix_like.preconditioner.PRECONDITIONERS`.
            damping: lambda as a multiple of the mean eigenvalue of each module's block, ``"auto"``, or
                ``{"absolute": lambda}``; see :mod:`logix_like.damping`.
            mode: A key of :data:`logix_like.query.modes.MODES`.
            reduce: A key of :data:`logix_like.query.question.REDUCTIONS`.
            engine: One of :data:`logix_like.query.question.ENGINES`.
            where: Rank only some samples: ``{column: value or values}`` (columns are ``data_id``, ``step``,
                ``epoch`` and the user's metadata), ids, or a mask over the rows of ``store.view(reduce)``.
            data_id: Rank only the samples with these ids; the result has them in the store's order.
            per: Split scores by ``"module"`` or by ``"layer"`` (a module's name up to its last number).
            normalize: Ask with each query's gradient at length 1 (in the preconditioner's geometry), so that scores
                of different queries can be compared.
            client: For ``engine="dask"``: a Dask client or an executor; see :mod:`logix_like.query.distributed`.
            index: For ``engine="faiss"``: a factory string of FAISS; see :mod:`logix_like.query.index`.
            progress: Show a progress bar: always, never, or (None) on a terminal when it takes long.

        Raises:
            QueryError: an option, an id or a query makes no sense.
            ModelMismatchError: the queries' modules or projections are not the store's.
            EmptyStoreError: the store has no row to rank.
            StatisticsError: a statistic is missing and cannot be computed, or a block is singular.
        """
        question = Question(k, preconditioner, Damping.of(damping), mode, reduce, engine, per, normalize)
        every = self._every(reduce)
        if k is not None and k > every.count:
            raise QueryError(f"k is {k}, but there are only {every.count} samples to rank; ask for fewer")
        candidates = select(select(every, where), data_id)
        return self._influence(question, query, candidates, client, index, progress)

    def _influence(
        self,
        question: Question,
        query: QueryGradients,
        candidates: Candidates,
        client: object,
        index: str,
        progress: bool | None,
    ) -> InfluenceResult:
        layout, wished = candidates.rows.layout, question.k
        require_answerable(query, layout, self._store)
        chosen = f"{candidates.count:,} {REDUCTIONS[question.reduce]}"
        if wished is not None and wished > candidates.count:
            question = replace(question, k=candidates.count)
            chosen += ALL_OF_FEWER.format(wished)
        fit = self._fitter.fit(question.preconditioner, question.damping, progress)
        task = self._task(question, query, candidates, fit, progress)
        parts = None if question.per is None else parts_of(layout, question.per)
        answer, remark = self._answer(question, task, fit, parts, client, index)
        held = [answer["scores"]] if wished is None else [answer["top"].scores, answer["bottom"].scores]
        if not all(bool(scores.isfinite().all()) for scores in held):
            raise QueryError(
                f"some scores are too large for {candidates.dtype}: divide the queries' loss by a constant, which "
                "divides their scores by it"
            )
        return InfluenceResult(
            query_id=tuple(query.data_id),
            samples=candidates.count,
            mode=question.mode,
            preconditioner=question.preconditioner,
            damping=question.damping.setting,
            reduce=question.reduce,
            engine=question.engine,
            note=self._note(chosen, question, fit, query, remark),
            source=str(getattr(self._store, "path", "")),
            part_names=() if parts is None else parts.names,
            **answer,
        )

    def self_influence(
        self,
        query: QueryGradients | None = None,
        *,
        preconditioner: str = "auto",
        damping: DampingSetting = 0.1,
        reduce: str = "mean",
        where: Where | None = None,
        data_id: Sequence[DataId] | None = None,
        progress: bool | None = None,
    ) -> SelfInfluence:
        """``g^T (F + lambda I)^-1 g`` of each sample of the store, or of each of ``query``'s gradients.

        Options and errors are those of :meth:`influence`.
        """
        question = Question(None, preconditioner, Damping.of(damping), "dot", reduce)
        candidates = select(select(self._every(reduce), where), data_id)
        if query is not None:
            require_answerable(query, candidates.rows.layout, self._store)
        fit = self._fitter.fit(preconditioner, question.damping, progress)
        chosen = f"{candidates.count:,} {REDUCTIONS[reduce]}"
        settings = preconditioner, question.damping.setting, reduce, self._note(chosen, question, fit, query)
        if query is not None:
            applied = query.preconditioned(fit.preconditioner, candidates.dtype)
            scores = squared_lengths(query.gradients.detach().cpu(), applied).to(candidates.dtype)
            return SelfInfluence(id_array(query.data_id), scores, *settings, rows=fit.rows)
        positions = candidates.positions()
        scores = self._lengths.of(candidates, fit, progress)[positions].to(candidates.dtype)
        ids, step = labels(candidates, positions, reduce)
        return SelfInfluence(ids, scores, *settings, step, fit.rows)

    def group_influence(
        self,
        query: QueryGradients,
        groups: Mapping[str, Sequence[DataId]] | Sequence[DataId],
        *,
        order: int = 1,
        preconditioner: str = "auto",
        damping: DampingSetting = 0.1,
        reduce: str = "mean",
        progress: bool | None = None,
    ) -> GroupInfluence:
        """Score sets of samples as wholes; other options and errors are those of :meth:`influence`.

        Args:
            query: What to ask with.
            groups: Ids by the set's name; or one list of ids.
            order: 1 sums the samples' scores; 2 takes one Newton step on the loss of the remaining samples, whose
                curvature lacks that of the set (:func:`logix_like.query.groups.second_order`). Order 2 is the better
                the larger the set's share in any direction; both agree for small sets.
            preconditioner: As in :meth:`influence`.
            damping: As in :meth:`influence`.
            reduce: As in :meth:`influence`.
            progress: As in :meth:`influence`.
        """
        if order not in (1, 2):
            raise QueryError(f"order is {order!r}; it must be 1 (sum of scores) or 2 (one Newton step)")
        question = Question(None, preconditioner, Damping.of(damping), "dot", reduce)
        named, every = named_groups(groups), self._every(reduce)
        require_answerable(query, every.rows.layout, self._store)
        fit = self._fitter.fit(preconditioner, question.damping, progress)
        preconditioned = query.preconditioned(fit.preconditioner)
        scores, sizes = [], []
        for ids in named.values():
            chosen = select(every, ids)
            total = total_of(chosen, progress)
            score = preconditioned.double() @ total
            if order == 2:
                held = select(self._every("none"), ids)
                score += second_order(chosen.rows.layout, fit.preconditioner, preconditioned, total, held, fit.rows)
            scores.append(score)
            sizes.append(chosen.count)
        note = f"{'sum of scores' if order == 1 else 'one Newton step'}; {fit.described}; {REDUCTIONS[reduce]}"
        names = tuple(named)
        return GroupInfluence(tuple(query.data_id), names, tuple(sizes), torch.stack(scores, 1).float(), order, note)

    def similar(
        self,
        data_id: Sequence[DataId],
        *,
        k: int = 10,
        mode: str = "cosine",
        preconditioner: str = "identity",
        reduce: str = "mean",
        **options: Any,
    ) -> InfluenceResult:
        """The samples whose stored gradients are most like those of ``data_id``, each sample itself left out.

        A cosine near 1 tells of a near-duplicate for the model, however different the data look. ``options`` are those
        of :meth:`influence`; the result's ``top`` is the nearest first, its ``bottom`` the most opposed.
        """
        every = self._every(reduce)
        asked, among = select(every, data_id), select(every, options.get("where"))
        positions = asked.positions()
        ids, _ = labels(asked, positions, reduce)
        own = Counter(labels(among, (among.wanted & asked.wanted).nonzero().flatten(), reduce)[0].tolist())
        most = max(own.values(), default=0)
        if not is_count(k) or not 1 <= k <= every.count - most:
            raise QueryError(
                f"k is {k!r}; it must be between 1 and {every.count - most}, all that are ranked but the one itself"
            )
        held = min(k, among.count - most)
        if not held:
            raise QueryError("where leaves no sample to be like but the one itself; choose more of them")
        gradients, factor = asked.fetch(positions), asked.factor
        if factor is not None:
            gradients = gradients * factor[positions, None]
        query = QueryGradients(tuple(ids.tolist()), gradients, every.rows.layout, "stored rows")
        asked_of = {"mode": mode, "preconditioner": preconditioner, "reduce": reduce, **options}
        result = self.influence(query, k=held + most, **asked_of)
        assert result.top is not None and result.bottom is not None
        top, bottom = (side.without(result.query_id, held) for side in (result.top, result.bottom))
        return replace(result, top=top, bottom=bottom, note=result.note + ("" if held == k else ALL_OF_FEWER.format(k)))

    def preconditioned(
        self,
        query: QueryGradients,
        *,
        preconditioner: str = "auto",
        damping: DampingSetting = 0.1,
        progress: bool | None = None,
    ) -> Tensor:
        """``(F + lambda I)^-1 g_q`` of each query, ``[queries, width]``: its product with any row is a score."""
        require_preconditioner(preconditioner)
        require_answerable(query, self._every("none").rows.layout, self._store)
        fit = self._fitter.fit(preconditioner, Damping.of(damping), progress)
        return query.preconditioned(fit.preconditioner)

    def preconditioner(self, name: str = "auto", damping: DampingSetting = 0.1) -> FittedPreconditioner:
        """The preconditioner that a query with these settings uses; fitted now if it was not yet."""
        require_preconditioner(name)
        self._require_rows()
        return self._fitter.fit(name, Damping.of(damping), None).preconditioner

    def _require_rows(self) -> None:
        if not len(self._store):
            raise EmptyStoreError(
                "the store holds no rows: log some samples and commit them (run.commit() or run.finalize()) "
                "before asking"
            )

    def _every(self, reduce: str) -> Candidates:
        """All rows of a view that can be ranked."""
        self._require_rows()
        return self._candidates.get(
            (self._store.key, reduce), lambda: Candidates.valid(self._store.view(reduce), self._keep_bytes)
        )

    def _task(
        self, question: Question, query: QueryGradients, candidates: Candidates, fit: Fit, progress: bool | None
    ) -> Task:
        mode = MODES[question.mode]
        preconditioned = query.preconditioned(fit.preconditioner, candidates.dtype)
        query_lengths = lengths = torch.empty(0)
        if mode.uses_lengths or question.normalize:
            query_lengths = squared_lengths(query.gradients.detach().cpu(), preconditioned)
        if question.normalize:
            scale = query_lengths.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
            preconditioned = (preconditioned.double() * scale[:, None]).to(preconditioned.dtype)
            query_lengths = (query_lengths > 0).double()
        if mode.uses_lengths:
            lengths = self._lengths.of(candidates, fit, progress)
        return Task(candidates, Scorer(mode, preconditioned, query_lengths, lengths, candidates.factor), progress)

    def _answer(
        self, question: Question, task: Task, fit: Fit, parts: Parts | None, client: object, index: str
    ) -> tuple[dict[str, Any], str]:
        """The fields of a result that hold scores, and a remark on how they were found."""
        candidates, reduce = task.candidates, question.reduce
        if question.k is None:
            ids, step = labels(candidates, candidates.positions(), reduce)
            split = None if parts is None else every_part(task, parts)
            scores = every_score(task) if split is None else split.sum(dim=2)
            return {"data_id": ids, "scores": scores, "step": step, "parts": split}, ""
        (top, bottom), remark = self._extremes(question, question.k, task, fit, client, index)

        def named(side: Extremes) -> Any:
            return ranking(candidates, side, reduce, None if parts is None else parts_of_extremes(task, side, parts))

        return {"top": named(top), "bottom": named(bottom)}, remark

    def _extremes(
        self, question: Question, k: int, task: Task, fit: Fit, client: object, index: str
    ) -> tuple[Sides, str]:
        if question.engine == "dask":
            from logix_like.query.distributed import distributed_extremes

            return distributed_extremes(task, question.mode, k, client)
        if question.engine == "exact":
            return exact_extremes(task, k), ""
        every = self._every(question.reduce)
        require_factory(index, task.scorer.mode, every.rows.layout.width)  # whatever the store's size
        if every.fits_in_memory:
            return exact_extremes(task, k), "the store is so small that scoring every row is faster than an index"
        fitted_to = self._store.key if task.scorer.mode.uses_lengths else ""
        fitted = str((question.preconditioner, question.damping))
        key = IndexKey(index, question.reduce, question.mode, fitted, fitted_to)
        cache = getattr(self._store, "cache", None)
        vectors = partial(self._vectors, every, task, fit)
        return self._search.extremes(task, k, key, every.rows.key, cache, vectors)

    def _vectors(self, every: Candidates, task: Task, fit: Fit) -> Vectors:
        """All rows that can be ranked, laid out for an index, whichever of them are asked for."""
        scorer = task.scorer
        lengths = torch.zeros(len(every.rows), dtype=torch.float64)
        if scorer.mode.uses_lengths:
            lengths = self._lengths.of(every, fit, task.progress)
        return Vectors(every, scorer.mode, lengths, scorer.factor, fit.preconditioner, task.progress)

    def _note(self, chosen: str, question: Question, fit: Fit, query: QueryGradients | None, remark: str = "") -> str:
        parts = [
            chosen,
            question.described if query is not None else "self-influence",
            fit.described,
            f"{question.engine} engine" + (f" ({remark})" if remark else ""),
        ]
        left_out = len(self._store) - fit.rows
        if left_out:
            parts.append(f"{left_out:,} stored rows left out (not finite, or superseded)")
        if self._store.damaged_rows:
            parts.append(f"{self._store.damaged_rows:,} stored rows left out (their files are damaged)")
        return "; ".join(parts + ([f"queries: {query.note}"] if query is not None and query.note else []))
