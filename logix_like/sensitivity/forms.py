"""How far a sample's own outputs would move without it: the forms of the Memory-Perturbation Equation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from logix_like.estimators.flat import FlatModel
from logix_like.objective import Batch, Likelihood
from logix_like.sensitivity.posterior import Posterior, at_least_float32

Form = Literal["loo", "full", "diagonal"]


@dataclass(frozen=True, eq=False)
class Deviations:
    """What leaving each sample of a batch out does to its own outputs."""

    outputs: Tensor
    """``[batch, outputs]``: as they are."""
    variance: Tensor
    """``[batch, outputs]``: variance of each output, the diagonal of ``V = J S J^T``."""
    shift: Tensor
    """``[batch, outputs]``: how far the outputs move."""


def deviations(flat: FlatModel, posterior: Posterior, theta: Tensor, batch: Batch, form: Form) -> Deviations:
    """The shift of each sample's outputs in one of the forms.

    ``loo``: ``V (I - Lambda V)^-1 e``, the covariance without the sample by Woodbury's formula (one Newton step from
    the trained weights; exact for least squares). ``full``: ``V e``, first order. ``diagonal``: ``v_kk e_k``, as the
    authors compute it. ``e`` is the residual (probabilities minus label), Lambda the loss's Hessian in the outputs.
    """
    jacobian = flat.jacobians(theta, batch)
    outputs = flat.outputs(theta, batch)
    targets = flat.objective.labels(batch)
    likelihood = flat.objective.likelihood
    residual = likelihood.residual(outputs, targets).flatten(1)
    covariance = posterior.times(jacobian) @ jacobian.mT

    def hessian(vector: Tensor) -> Tensor:
        return likelihood.hessian_product(outputs, targets, vector.view(outputs.shape)).flatten(1)

    variance = covariance.diagonal(dim1=1, dim2=2)
    return Deviations(outputs.flatten(1), variance, FORMS[form](covariance, residual, hessian))


def shift_by_loo(covariance: Tensor, residual: Tensor, hessian: Callable[[Tensor], Tensor]) -> Tensor:
    """``V (I - Lambda V)^-1 e``, ``[batch, outputs]``."""
    products = at_least_float32(torch.func.vmap(hessian, in_dims=2, out_dims=2)(covariance))
    system = torch.eye(covariance.shape[1], dtype=products.dtype, device=products.device) - products
    solved: Tensor = torch.linalg.solve(system, residual.to(system).unsqueeze(2))
    return (covariance @ solved.to(covariance)).squeeze(2)


def shift_in_full(covariance: Tensor, residual: Tensor, hessian: Callable[[Tensor], Tensor]) -> Tensor:
    """``V e``."""
    return (covariance @ residual.unsqueeze(2)).squeeze(2)


def shift_by_diagonal(covariance: Tensor, residual: Tensor, hessian: Callable[[Tensor], Tensor]) -> Tensor:
    """``v_kk e_k``."""
    return covariance.diagonal(dim1=1, dim2=2) * residual


FORMS: Mapping[str, Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "loo": shift_by_loo,
    "full": shift_in_full,
    "diagonal": shift_by_diagonal,
}
"""By name."""


def prediction_shift(likelihood: Likelihood, outputs: Tensor, targets: Tensor, shift: Tensor, form: Form) -> Tensor:
    """How far the predictions (probabilities, means) move with the outputs, ``[batch, ...]`` as all the others.

    ``loo``: prediction at the moved outputs minus that at the present ones. ``full``: ``Lambda shift``.
    ``diagonal``: ``Lambda_kk shift_k``, as the authors compute it.
    """
    if form == "loo":
        return likelihood.residual(outputs + shift, targets) - likelihood.residual(outputs, targets)
    if form == "full":
        return likelihood.hessian_product(outputs, targets, shift)
    units = torch.eye(shift[0].numel(), dtype=shift.dtype, device=shift.device).view(-1, *shift.shape[1:])
    columns = torch.func.vmap(lambda unit: likelihood.hessian_product(outputs, targets, unit.expand_as(outputs)))(units)
    return (columns.flatten(2).diagonal(dim1=0, dim2=2).view(shift.shape)) * shift


def directional_shift(flat: FlatModel, posterior: Posterior, theta: Tensor, batch: Batch) -> Tensor:
    """``V e`` without any Jacobian, ``[batch, ...]``: each sample's outputs along ``S g_i`` (H1).

    One derivative along a direction for each sample, whatever the number of outputs: for large vocabularies.
    """
    directions = posterior.times(flat.sample_gradients(theta, batch))
    return flat.outputs_along(theta, batch, directions)


def sampled_shift(
    flat: FlatModel,
    posterior: Posterior,
    theta: Tensor,
    batch: Batch,
    loss: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
) -> Tensor:
    """``Cov(f_i, l_i)`` over draws of the posterior, ``[batch, outputs]``: also for losses without a derivative.

    The general form of the equation: the natural gradient of the expected loss by the mean is
    ``E[(theta - m) l_i(theta)]``, no derivative of the loss being needed. Equals ``V E[e]`` in expectation; its
    error falls as one over the root of the number of draws.

    Args:
        flat: the model as a function of its parameters.
        posterior: their covariance.
        theta: their mean.
        batch: the samples.
        loss: ``loss(outputs [batch, ...], targets) -> [batch]``, e.g. the classification error.
        noise: ``[draws, parameters]``, standard normal; taken with both signs, which cancels all even terms.
    """
    targets = flat.objective.labels(batch)
    outputs, losses = [], []
    for deviation in posterior.draw(noise):
        for sign in (1, -1):
            drawn = flat.outputs(theta + sign * deviation, batch)
            outputs.append(drawn.flatten(1))
            losses.append(loss(drawn, targets))
    f, values = torch.stack(outputs), torch.stack(losses).unsqueeze(2).to(outputs[0])
    return ((f - f.mean(0)) * (values - values.mean(0))).mean(0)
