"""Representer points (Yeh et al. 2018, arXiv 1811.09720): a prediction as a sum over training samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from logix_like.errors import QueryError
from logix_like.estimators.along import as_ids
from logix_like.estimators.base import Estimator
from logix_like.estimators.last_layer import LastLayer
from logix_like.ids import as_data_ids
from logix_like.objective import Batch, Objective
from logix_like.query.result import Ids

STATIONARY = 1e-4
"""Residual from which on the decomposition is said to be inexact, relative to the size of the outputs."""


@dataclass(frozen=True)
class Refit:
    """How well the last layer was fitted again."""

    iterations: int
    residual: float
    """Largest entry of the gradient of the regularised loss, divided by the decay: how far outputs are off."""


class RepresenterPoints(Estimator):
    """``outputs_q = sum_i alpha_i (f_i . f_q)`` with ``alpha_i = - e_i / (decay n)``, exact at a stationary point.

    ``f`` are the inputs of the last layer (with a one for its bias), ``e_i`` the residual of sample i. The penalty is
    ``decay / 2 ||W||^2`` on the *mean* loss, bias included, and so the factor is ``1 / (decay n)``; with
    ``decay ||W||^2``, as in the paper's Theorem 3.1, it is ``1 / (2 decay n)``. The last layer is fitted again to
    stationarity by L-BFGS in float64 (the paper's own line search); the model is not changed.

    The score of a sample is its part of the outputs along the direction in which the query's loss falls,
    ``-e_q`` (for classes: of the label's logit, minus those of the others by their probabilities).

    Sign: a positive score means that the sample pulls the query's prediction towards its label (a proponent, helpful);
    negative, away from it (an opponent, harmful).

    Args:
        model: the trained model.
        objective: what it was trained for; its outputs are the last layer's.
        batches: the training data; samples are numbered unless ``data_id`` names them.
        decay: strength of the penalty; small values need more iterations.
        data_id: one id for each sample, in the order of ``batches``: a sequence, an array or a tensor.
        layer: the last layer's name (None: the last ``nn.Linear``).
        iterations: most iterations of the fit.
    """

    name: ClassVar[str] = "representer points"

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batches: Iterable[Batch],
        *,
        decay: float = 1e-3,
        data_id: Any = None,
        layer: str | None = None,
        iterations: int = 1000,
    ) -> None:
        if not decay > 0:
            raise QueryError(f"decay is {decay}; representer points exist only with a penalty, a number above 0")
        self._layer = LastLayer(model, objective, layer)
        self._likelihood = objective.likelihood
        self._features, self._targets = self._read(batches)
        self._ids = as_data_ids(range(len(self._features)) if data_id is None else data_id)
        if len(self._ids) != len(self._features):
            raise QueryError(f"{len(self._ids)} data ids were given for {len(self._features)} samples")
        self._decay = decay
        self.weight, self.refit = self._fit(self._layer.weight.double(), iterations)
        """``[outputs, inputs]`` of the fit, the bias as the last column; and how it went."""
        self._warn_unless_stationary()

    @property
    def data_id(self) -> Ids:
        return as_ids(self._ids)

    @property
    def alpha(self) -> Tensor:
        """``[samples, outputs]``: each sample's weight for each output."""
        return -self._residuals(self.weight) / (self._decay * len(self._features))

    def outputs(self, queries: Batch) -> Tensor:
        """``[queries, outputs]`` of the fitted layer."""
        return self._layer.factors(queries).features.double() @ self.weight.T

    def values(self, queries: Batch) -> Tensor:
        """``[queries, samples, outputs]``: every sample's part of every output; they add up to :meth:`outputs`."""
        kernel = self._layer.factors(queries).features.double() @ self._features.T
        return kernel.unsqueeze(2) * self.alpha

    def scores(self, queries: Batch) -> Tensor:
        """``[queries, samples]``: parts of the output along which the query's loss falls, its residual's direction.

        For classes that is the part of the label's logit minus the parts of the others by their probabilities.
        """
        factors = self._layer.factors(queries)
        outputs = factors.features.double() @ self.weight.T
        residual = self._likelihood.residual(outputs, self._layer.objective.labels(queries))
        return -(factors.features.double() @ self._features.T) * (residual @ self.alpha.T)

    def self_influence(self) -> Tensor:
        """``[samples]``."""
        return -self._features.square().sum(1) * (self._residuals(self.weight) * self.alpha).sum(1)

    def _read(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        features, targets = [], []
        for batch in batches:
            features.append(self._layer.factors(batch).features.double())
            targets.append(self._layer.objective.labels(batch))
        if not features:
            raise QueryError("there is no training sample; give the batches that the model was trained on")
        return torch.cat(features), torch.cat(targets)

    def _residuals(self, weight: Tensor) -> Tensor:
        return self._likelihood.residual(self._features @ weight.T, self._targets)

    def _loss(self, weight: Tensor) -> Tensor:
        losses = self._likelihood.losses(self._features @ weight.T, self._targets)
        return losses.mean() + self._decay / 2 * weight.square().sum()

    def _fit(self, start: Tensor, iterations: int) -> tuple[Tensor, Refit]:
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight], max_iter=iterations, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self._loss(weight)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        found = weight.detach()
        slope = self._residuals(found).T @ self._features / len(self._features) + self._decay * found
        return found, Refit(int(optimizer.state[weight]["n_iter"]), float(slope.abs().max()) / self._decay)

    def _warn_unless_stationary(self) -> None:
        size = float((self._features @ self.weight.T).abs().max())
        if self.refit.residual > STATIONARY * max(size, 1.0):
            warnings.warn(
                f"after {self.refit.iterations} iterations the last layer is not at its optimum: parts and outputs "
                f"differ by about {self.refit.residual:.2g} times a feature; give more iterations, or a larger decay",
                RuntimeWarning,
                stacklevel=3,
            )
