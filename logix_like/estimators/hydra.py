"""HyDRA (Chen et al. 2021, arXiv 2102.02515): derivatives of the weights by each sample's weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from logix_like.errors import ConfigError
from logix_like.estimators.along import PathEstimator
from logix_like.estimators.flat import DataOf
from logix_like.estimators.replay import Point
from logix_like.objective import Batch, Objective
from logix_like.path import TrainingPath
from logix_like.updates import Moments
from logix_like.weights import differentiable

GIBIBYTE = 2**30


class Hydra(PathEstimator):
    """Hypergradients ``d theta_T / d w_i`` of every sample, carried forward through the optimizer's steps.

    One pass serves any number of queries: ``score = -g_q(theta_T) . d theta_T / d w_i``. Exact (the default) it
    equals :class:`ExactUnrolling`. ``fast`` drops the term with the Hessian (Algorithm 4), which saves a product for
    each sample and step but is **not** accurate under momentum or over many steps (correlation about .35 with the
    exact one on a small network): take it for a ranking at most.

    Args:
        path, model, objective, data: as for :class:`PathEstimator`.
        fast: drop the Hessian term.
        chunk: samples whose hypergradients are taken through a step together.
        memory_gib: most memory that the hypergradients may take (see :attr:`bytes_needed`).

    Raises:
        ConfigError: they would take more; said before anything is computed.
    """

    name: ClassVar[str] = "HyDRA"

    def __init__(
        self,
        path: TrainingPath,
        model: nn.Module,
        objective: Objective,
        data: DataOf,
        *,
        fast: bool = False,
        chunk: int = 64,
        memory_gib: float = 4.0,
    ) -> None:
        super().__init__(path, model, objective, data, chunk=chunk)
        self._fast = fast
        self._hypergradients: Tensor | None = None
        if self.bytes_needed > memory_gib * GIBIBYTE:
            raise ConfigError(
                f"HyDRA would keep {1 + len(self._replay.rule.moments)} x {len(self._ids):,} samples x "
                f"{self._replay.flat.width:,} parameters, {self.bytes_needed / GIBIBYTE:.1f} GiB, more than memory_gib="
                f"{memory_gib}; raise it, train fewer parameters, or use ExactUnrolling, whose memory does not grow "
                "with the samples"
            )

    @property
    def bytes_needed(self) -> int:
        """Memory of the hypergradients of weights and moments."""
        flat = self._replay.flat
        return (1 + len(self._replay.rule.moments)) * len(self._ids) * flat.width * flat.theta.element_size()

    @property
    def hypergradients(self) -> Tensor:
        """``[samples, parameters]``: ``d theta_T / d w_i``; computed once."""
        if self._hypergradients is None:
            with differentiable(self._model):
                self._hypergradients = self._forward()
        return self._hypergradients

    def self_influence(self) -> Tensor:
        """``[samples]``: each sample's score for itself at the end of training."""
        rows = []
        theta = self._replay.end()
        for start in range(0, len(self._ids), self._chunk):
            ids = self._ids[start : start + self._chunk]
            with differentiable(self._model):
                own = self._gradients(theta, self._data(ids))
            rows.append(-(own * self.hypergradients[start : start + len(ids)]).sum(1))
        return torch.cat(rows)

    def _walk(self, queries: Batch) -> Tensor:
        return -self._gradients(self._replay.end(), queries) @ self.hypergradients.T

    def _forward(self) -> Tensor:
        weights = self._replay.flat.theta.new_zeros(len(self._ids), self._replay.flat.width)
        moments = self._replay.zeros(len(self._ids))
        for point in self._replay.forwards():
            self._push(point, weights, moments)
        return weights

    def _push(self, point: Point, weights: Tensor, moments: Moments) -> None:
        """Take the derivatives of all samples through a step, in place, ``chunk`` samples at a time."""
        flat = self._replay.flat
        bent = None if self._fast else flat.curvature_products(point.theta, self._replay.batches(point.step))
        visits = [(self._column[one], b.weight) for b in point.step.blocks for one in b.data_id]
        rows = [flat.sample_gradients(point.theta, self._data(block.data_id)) for block in point.step.blocks]
        columns = torch.tensor([column for column, _ in visits], dtype=torch.long, device=weights.device)
        shares = weights.new_tensor([weight for _, weight in visits])
        for start in range(0, len(weights), self._chunk):
            part = slice(start, start + self._chunk)
            gradients = torch.zeros_like(weights[part]) if bent is None else bent(weights[part])
            own = (columns >= start) & (columns < start + self._chunk)
            if bool(own.any()):
                added = torch.cat(rows)[own] * shares[own].unsqueeze(1)
                gradients = gradients.index_add(0, columns[own] - start, added)
            kept = {name: moment[part] for name, moment in moments.items()}
            pushed, after = self._replay.push(point, weights[part], gradients, kept)
            weights[part] = pushed
            for name, moment in after.items():
                moments[name][part] = moment
