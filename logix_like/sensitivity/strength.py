"""Choosing the strength of the L2 penalty by leave-one-out cross-validation, from one trained model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from logix_like.errors import ConfigError
from logix_like.estimators.flat import FlatModel
from logix_like.objective import Batch, Objective
from logix_like.sensitivity.forms import FORMS, Form
from logix_like.sensitivity.posterior import DensePosterior
from logix_like.weights import differentiable, trained_parameters

NEWTON_STEPS = 50
CONVERGED = 1e-10


@dataclass(frozen=True)
class StrengthSweep:
    """Losses by strength of the penalty."""

    strengths: tuple[float, ...]
    """Of ``strength / 2 ||theta||^2`` on the summed loss."""
    train_loss: tuple[float, ...]
    """Mean training loss at the optimum for each."""
    loo_loss: tuple[float, ...]
    """Leave-one-out estimate for each."""

    @property
    def best(self) -> float:
        """The strength with the lowest leave-one-out loss."""
        return self.strengths[self.loo_loss.index(min(self.loo_loss))]


def choose_strength(
    model: nn.Module,
    batches: Iterable[Batch],
    strengths: Iterable[float],
    objective: Objective | None = None,
    *,
    parameters: Sequence[str] = ("*",),
    form: Form = "loo",
) -> StrengthSweep:
    """Estimate the leave-one-out loss for each strength without training again.

    The model is made linear in its parameters around the trained ones; for each strength that linear model is
    brought to its optimum by Newton steps, and its leave-one-out loss estimated there. Exact for linear and
    logistic regression, and for the last layer of any network (``parameters=("head.*",)``); for more of a network,
    what its linearisation says. All Jacobians are held, ``samples x outputs x parameters``.

    Raises:
        ConfigError: there is no strength or no sample, a strength is negative, or the form is unknown.
    """
    objective = objective or Objective()
    if form not in FORMS:
        raise ConfigError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    chosen = tuple(float(strength) for strength in strengths)
    if not chosen or not all(strength >= 0 for strength in chosen):
        raise ConfigError(f"strengths are {chosen}; give at least one number, 0 or more")
    linear = _Linearised(FlatModel(model, objective, trained_parameters(model, parameters)), batches)
    train, left_out = [], []
    theta = linear.start
    for strength in chosen:
        theta = linear.optimum(theta, strength)
        train.append(float(linear.losses(linear.outputs(theta)).mean()))
        left_out.append(linear.loo_loss(theta, strength, form))
    return StrengthSweep(chosen, tuple(train), tuple(left_out))


class _Linearised:
    """``outputs(theta) = outputs_0 + J (theta - theta_0)`` over all samples."""

    def __init__(self, flat: FlatModel, batches: Iterable[Batch]) -> None:
        self._likelihood = flat.objective.likelihood
        self.start = flat.theta
        with differentiable(flat.model):
            parts = [
                (flat.outputs(self.start, b), flat.jacobians(self.start, b), flat.objective.labels(b)) for b in batches
            ]
        if not parts:
            raise ConfigError("there is no training sample; give the batches that the model was trained on")
        self._at_start, self._jacobian, self._targets = (torch.cat(part) for part in zip(*parts, strict=True))

    def outputs(self, theta: Tensor) -> Tensor:
        moved = (self._jacobian @ (theta - self.start)).view(self._at_start.shape)
        return self._at_start + moved

    def losses(self, outputs: Tensor) -> Tensor:
        return self._likelihood.losses(outputs, self._targets)

    def optimum(self, theta: Tensor, strength: float) -> Tensor:
        """The minimum of the summed loss plus penalty, by Newton's method with halved steps where one is too long."""
        for _ in range(NEWTON_STEPS):
            outputs = self.outputs(theta)
            residual = self._likelihood.residual(outputs, self._targets).flatten(1)
            slope = torch.einsum("nkp,nk->p", self._jacobian, residual) + strength * theta
            step = self._posterior(outputs, strength).times(slope)
            before = self._total(theta, strength)
            size = 1.0
            while self._total(theta - size * step, strength) > before + CONVERGED * abs(before) and size > 1e-6:
                size /= 2
            theta = theta - size * step
            if float(step.norm()) <= CONVERGED * max(float(theta.norm()), 1.0):
                break
        return theta

    def loo_loss(self, theta: Tensor, strength: float, form: Form) -> float:
        outputs = self.outputs(theta)
        residual = self._likelihood.residual(outputs, self._targets).flatten(1)
        covariance = self._posterior(outputs, strength).times(self._jacobian) @ self._jacobian.mT

        def hessian(vector: Tensor) -> Tensor:
            return self._hessian(outputs, vector)

        shift = FORMS[form](covariance, residual, hessian)
        return float(self.losses(outputs + shift.view(outputs.shape)).mean())

    def _total(self, theta: Tensor, strength: float) -> float:
        return float(self.losses(self.outputs(theta)).sum() + strength / 2 * theta.square().sum())

    def _posterior(self, outputs: Tensor, strength: float) -> DensePosterior:
        products = torch.func.vmap(lambda column: self._hessian(outputs, column), in_dims=2, out_dims=2)(self._jacobian)
        precision = self._jacobian.flatten(0, 1).T @ products.flatten(0, 1)
        return DensePosterior(precision + strength * torch.eye(len(precision)).to(precision))

    def _hessian(self, outputs: Tensor, vector: Tensor) -> Tensor:
        return self._likelihood.hessian_product(outputs, self._targets, vector.view(outputs.shape)).flatten(1)
