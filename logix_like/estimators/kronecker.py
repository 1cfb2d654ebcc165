"""Influence functions with K-FAC and EK-FAC at full size: the most accurate answer that one pass can give."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from logix_like.capture.selection import Selection, select_stored
from logix_like.curvature.curvature import Curvature, Kind, damped_inverse_of
from logix_like.curvature.fitting import default_selection, fit_curvature
from logix_like.curvature.gradients import Gradients, InnerProducts, QuadraticForms, SquareSums
from logix_like.curvature.passes import At, once
from logix_like.curvature.sweep import Losses, Sweep
from logix_like.damping import Damping, DampingSetting
from logix_like.errors import QueryError
from logix_like.estimators.base import Estimator
from logix_like.estimators.samples import DataIds, Samples, require_samples
from logix_like.linalg.lowrank import LowRank, low_rank
from logix_like.linalg.products import Precision
from logix_like.objective import Batch, Objective
from logix_like.query.result import Ids


class KroneckerInfluence(Estimator, ABC):
    """``g_q^T (F + lambda I)^-1 g_i`` with a Kronecker-factored ``F`` (Grosse et al. 2023), without a store.

    Queries are batches like those of the training. They are preconditioned once; the training samples then stream by
    in one pass, whatever the number of queries, in which no weight gradient is computed and inner products are taken
    from the factors where that costs less than forming a sample's gradient.

    Args:
        model: At the weights that are asked about; not changed.
        loader: Batches of training samples, always in the same order.
        objective: What the model is trained for; a classifier unless told otherwise.
        curvature: Fitted before (:func:`logix_like.curvature.fit_curvature`), or gathered by a run in training
            (``run.curvature("training")``); fitted when first needed if not given.
        damping: ``lambda`` as a multiple of the mean eigenvalue of each module's block, ``"auto"``, or
            ``{"absolute": lambda}``; see :mod:`logix_like.damping`.
        data_id: Names of the samples; a sequence, or what takes them from a batch. Running numbers if not given.
        selection: Tracked modules; those of ``curvature``, or all linear maps, unless told otherwise.
        mask: ``mask(batch) -> [batch, positions]``, which positions the factors count.
        rank: Keep each preconditioned query as a matrix of this rank in each module: less memory, an approximation.
        precision: Of the products of factors, in torch's words (``highest``, ``high``, ``medium``).
        at: Averages over several sets of weights (queries, samples and curvature alike): each call yields once for
            each after loading it into the model, as ``lambda: run.at_checkpoints("all")`` does.
        progress: Whether bars are shown.
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Batch],
        objective: Objective | None = None,
        *,
        curvature: Curvature | None = None,
        damping: DampingSetting = 0.1,
        data_id: DataIds = None,
        selection: Selection | None = None,
        mask: Callable[[Batch], Tensor | None] | None = None,
        rank: int | None = None,
        precision: Precision = "highest",
        at: At = once,
        progress: bool = True,
    ) -> None:
        if rank is not None and (type(rank) is not int or rank < 1):
            raise QueryError(f"rank is {rank!r}; it must be a whole number of at least 1, or None for whole matrices")
        self._objective = objective or Objective()
        if selection is None:
            selection = default_selection(model) if curvature is None else select_stored(model, curvature.layout)
        self._sweep = Sweep(model, self._objective, selection, mask=mask)
        self._samples = Samples(loader, self._objective, data_id=data_id, at=at, progress=progress)
        self._loader = loader
        self._mask = mask
        self._rank = rank
        self._precision: Precision = precision
        self._at = at
        self._progress = progress
        self._curvature = curvature
        if curvature is not None:
            self._require_kind(curvature)
            curvature.require_model(model, self._sweep.layout)
        self.damping = Damping.of(damping).setting
        """May be changed from question to question."""

    @property
    def data_id(self) -> Ids:
        """``[samples]``."""
        return self._samples.data_id

    @property
    def damping_setting(self) -> DampingSetting:
        """As it was given."""
        return self.damping

    @property
    def note(self) -> str:
        """Which Fisher."""
        fisher = self.curvature.fisher
        which = "true" if fisher.labels == "sampled" else "empirical"
        return f"{self.name}, {which} Fisher over {fisher.samples:,} samples."

    @property
    def curvature(self) -> Curvature:
        """What was given, or is fitted now."""
        if self._curvature is None:
            self._curvature = fit_curvature(
                self._sweep.model,
                self._loader,
                self._objective,
                kind=self.kind,
                selection=self._sweep.selection,
                mask=self._mask,
                at=self._at,
                precision=self._precision,
                progress=self._progress,
            )
        return self._curvature

    def scores(self, queries: Batch, losses: Losses | None = None) -> Tensor:
        """``[queries, samples]`` for a batch of queries.

        Args:
            queries: A batch as the training's.
            losses: What is asked about, ``losses(model, batch) -> [queries]``, where it is not the objective's loss.
        """
        return self._stream(self._preconditioned(queries, losses), lambda parts: parts.sum(0))

    def module_scores(self, queries: Batch, losses: Losses | None = None) -> dict[str, Tensor]:
        """By module, ``[queries, samples]``; they add up to :meth:`scores`."""
        vectors = self._preconditioned(queries, losses)
        return dict(zip(vectors, self._stream(vectors, lambda parts: parts), strict=True))

    def self_influence(self) -> Tensor:
        """``[samples]``: ``g_i^T (F + lambda I)^-1 g_i``; with several sets of weights the mean of theirs."""
        curvature = self._present_curvature()
        inverse = damped_inverse_of(self.damping, self._sweep.dtype)
        sink = QuadraticForms(curvature.bases, curvature.weights(inverse), self._precision)

        def values(batch: Batch) -> Tensor:
            self._sweep.run(batch, self._objective.backward_losses, sink)
            return sink.values

        return self._samples.collect("self-influence", values)

    def group_influence(self, queries: Batch, group: Batch, *, order: int = 2, losses: Losses | None = None) -> Tensor:
        """``[queries]``: the score of ``group``'s samples, a batch, as a whole.

        Of order 1 the sum of their scores; of order 2 one Newton step with the curvature of the samples that remain
        without them (Basu et al. 2020): the group's own squares are taken out of the eigenvalues.
        """
        if order not in (1, 2):
            raise QueryError(f"order is {order!r}; it must be 1 (sum of scores) or 2 (Newton step)")
        total = {name: blocks.sum(0, keepdim=True) for name, blocks in self.gradients(group).items()}
        whole = self._present_curvature()
        curvature = whole if order == 1 else self._without(group)
        moved = curvature.apply(self._inverse(), total)
        gradients = self.gradients(queries, losses)
        found = [
            (gradient * moved.get(name, torch.zeros_like(gradient[:1]))).flatten(1).sum(1)
            for name, gradient in gradients.items()
        ]
        return torch.stack(found).sum(0)

    def gradients(self, queries: Batch, losses: Losses | None = None) -> dict[str, Tensor]:
        """By module ``[queries, d_out, d_in]``: gradients of full size, averaged over the sets of weights."""
        require_samples(self._objective, queries)
        sums: dict[str, Tensor] = {}
        for count in self._samples.weights():  # noqa: B007 (how many there were is told below)
            sink = Gradients()
            self._sweep.run(queries, losses or self._objective.backward_losses, sink)
            for name, block in sink.blocks.items():  # a block may have none at some of them
                sums[name] = sums[name] + block if name in sums else block
        for name, block in sums.items():
            if not bool(block.isfinite().all()):
                raise QueryError(f"a gradient of module {name!r} is not finite: what was asked about cannot be scored")
        return {name: block / count for name, block in sums.items()}

    def _present_curvature(self) -> Curvature:
        curvature = self.curvature
        if self._at is once:
            curvature.compare_weights(self._sweep.model)
        return curvature

    def _require_kind(self, curvature: Curvature) -> None:
        if curvature.kind != self.kind:
            raise QueryError(
                f"the curvature is {curvature.kind!r}, and {self.name} needs {self.kind!r}: fit it with "
                f"kind={self.kind!r}, or ask with the estimator of the kind there is"
            )

    def _without(self, group: Batch) -> Curvature:
        """The curvature per sample of all, without what ``group`` adds to it."""
        whole = self.curvature
        squares = SquareSums(whole.bases, self._precision)
        generator = Generator(self._sweep.device).manual_seed(0)
        losses = partial(self._objective.backward_losses, draw=whole.fisher.labels == "sampled", generator=generator)
        for sets in self._samples.weights():  # noqa: B007 (how many there were is told below)
            self._sweep.run(group, losses, squares)
        sums = squares.sums.all()
        # Not the curvature's own number, in which a sample counts once for each visit or set of weights.
        count = len(self.data_id) * sets
        eigenvalues = {
            name: (values - sums[f"squares/{name}"].to(values) / count).clamp_min(0)
            if f"squares/{name}" in sums
            else values
            for name, values in whole.eigenvalues.items()
        }
        return Curvature(whole.kind, whole.layout, whole.bases, eigenvalues, whole.fisher)

    def _inverse(self) -> Callable[[str, Tensor], Tensor]:
        # The damping of all samples, also where some are taken out.
        whole = self.curvature

        def inverse(name: str, values: Tensor) -> Tensor:
            shift = {"absolute": whole.shift(name, self.damping)}
            return damped_inverse_of(shift, dtype=self._sweep.dtype)(name, values)

        return inverse

    def _preconditioned(self, queries: Batch, losses: Losses | None) -> dict[str, Tensor | LowRank]:
        curvature = self._present_curvature()
        inverse = damped_inverse_of(self.damping, self._sweep.dtype)
        vectors = curvature.apply(inverse, self.gradients(queries, losses))
        if self._rank is None:
            return dict(vectors)
        return {name: low_rank(vector, self._rank) for name, vector in vectors.items()}

    def _stream(self, vectors: dict[str, Tensor | LowRank], values: Callable[[Tensor], Tensor]) -> Tensor:
        """``values([modules, queries, batch])`` of every batch, side by side."""
        sink = InnerProducts(vectors, self._precision)

        def of_batch(batch: Batch) -> Tensor:
            self._sweep.run(batch, self._objective.backward_losses, sink)
            return values(torch.stack(list(sink.modules.values())))

        return self._samples.collect(f"{self.name} scores", of_batch)


class KFAC(KroneckerInfluence):
    """K-FAC: eigenvalues are products of the factors' own (Martens and Grosse 2015)."""

    name = "K-FAC"
    kind = "kfac"


class EKFAC(KroneckerInfluence):
    """EK-FAC: eigenvalues are measured in the factors' eigenbasis (George et al. 2018)."""

    name = "EK-FAC"
    kind = "ekfac"
