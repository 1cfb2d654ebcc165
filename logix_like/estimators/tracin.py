"""TracIn (Pruthi et al. 2020, arXiv 2002.08484), step by step along the recorded training."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from logix_like.errors import ConfigError
from logix_like.estimators.along import PathEstimator, scores_of
from logix_like.estimators.flat import DataOf
from logix_like.estimators.replay import Point
from logix_like.objective import Batch, Objective
from logix_like.path import TrainingPath


class TracIn(PathEstimator):
    """How far each sample's share of every optimizer step lowered the query's loss, to first order.

    The ideal TracIn of the paper (section 3.2, equation 55 of the survey 2212.04612), exact for every step: with SGD
    the sum over visits of ``lr / batch x g_q . g_i``. Under momentum, Adam, AdamW or RMSprop a sample's share is its
    part of the *realised* update: its gradient acts through the running mean in later steps too, scaled as the
    optimizer scaled it. (The formula of SGD is far off there.) Weight decay is no sample's.

    Over all samples the scores add up to the fall of the query's loss, up to terms of the order of the step size.
    Walks the path backwards; memory is :attr:`Replay.backward_bytes` and two vectors for each query.
    """

    name: ClassVar[str] = "TracIn"

    def _walk(self, queries: Batch) -> Tensor:
        scores: Tensor | None = None
        replay = self._replay
        for point in replay.backwards():
            wanted = self._wanted(point, queries)
            if scores is None:
                scores, later = scores_of(wanted, len(self._ids)), replay.zeros(len(wanted))
            # A step's derivative by its gradient: what is asked of this step, and of later ones through the moments.
            _, shares, later = replay.pull(point, wanted, later, fixed_scale=True)
            self._add(scores, point, -shares)
        assert scores is not None
        return scores

    def _wanted(self, point: Point, queries: Batch) -> Tensor:
        """``[queries, parameters]``: the slope of each query's loss along the step."""
        return self._gradients(point.theta, queries)


class InRunShapley(TracIn):
    """In-run data Shapley (Wang et al. 2024, arXiv 2406.11011): each step is a game, its value the fall of the loss.

    To first order a sample's Shapley value is its TracIn score. To second order (the default here) the fall of the
    loss also bends along the step, ``-1/2 d^T H_q d``; of a pair of samples' term each gets half, so that the slope
    is taken half a step ahead, ``g_q + H_q d / 2`` (section 4.2). Values add up to the fall of the query's loss with an
    error of the second order in the step size, where TracIn's is of the first.

    Args:
        path, model, objective, data, chunk: as for :class:`PathEstimator`.
        order: of the expansion of the query's loss, 1 or 2.

    Raises:
        ConfigError: ``order`` is another.
    """

    name: ClassVar[str] = "in-run Shapley"

    def __init__(
        self,
        path: TrainingPath,
        model: nn.Module,
        objective: Objective,
        data: DataOf,
        *,
        order: int = 2,
        chunk: int = 64,
    ) -> None:
        super().__init__(path, model, objective, data, chunk=chunk)
        if order not in (1, 2):
            raise ConfigError(f"order is {order}; the query's loss is expanded to order 1 or 2")
        self._order = order

    def _wanted(self, point: Point, queries: Batch) -> Tensor:
        slope = super()._wanted(point, queries)
        if self._order == 1:
            return slope
        after = self._replay.step(point.theta, point.gradient, point.moments, point)[0]
        products = self._replay.flat.sample_curvature_products(point.theta, queries, after - point.theta)
        return slope + products / 2
