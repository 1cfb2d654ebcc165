"""Exact derivatives of a trained model's losses by the weights of its samples, through every recorded step."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from logix_like.estimators.along import PathEstimator, scores_of
from logix_like.objective import Batch


class ExactUnrolling(PathEstimator):
    """The derivative of each query's final loss by each sample's weight in training (reverse mode; MAGIC, 2504.16430).

    Sample i's loss counts ``w_i`` times at each of its visits; the score is ``-d loss_q(theta_T) / d w_i`` at
    ``w = 1``, which estimates how far the loss would rise without the sample. Nothing is dropped: curvature,
    momentum, the scale of Adam. The anchor that other estimators over a path are measured against, for runs that
    fit: one product with the Hessian for each query and step; memory :attr:`Replay.backward_bytes`.
    """

    name: ClassVar[str] = "exact unrolling"

    def _walk(self, queries: Batch) -> Tensor:
        replay = self._replay
        theta = self._gradients(replay.end(), queries)
        moments = replay.zeros(len(theta))
        scores = scores_of(theta, len(self._ids))
        for point in replay.backwards():
            theta, gradient, moments = replay.pull(point, theta, moments, fixed_scale=False)
            self._add(scores, point, -gradient)
            theta = theta + replay.flat.curvature_products(point.theta, replay.batches(point.step))(gradient)
        return scores
