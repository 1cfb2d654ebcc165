"""Covariances of a model's parameters: from the optimizer's running state, or by Laplace's approximation.

All are those of a posterior of ``n`` samples with the prior ``strength / 2 ||theta||^2``:
``S = (n H + strength)^-1`` with H the curvature of the mean loss, or what stands for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from logix_like.curvature import Curvature
from logix_like.curvature.mapping import FlatCurvature
from logix_like.errors import ConfigError
from logix_like.estimators.flat import FlatModel
from logix_like.objective import Batch
from logix_like.weights import Flattener, differentiable

MOST_DENSE = 20_000
"""Parameters of a dense posterior at most: a matrix of 1.6 GB in float32."""


class Posterior(ABC):
    """A covariance ``S [parameters, parameters]`` of a flat vector of parameters."""

    @abstractmethod
    def times(self, rows: Tensor) -> Tensor:
        """``rows S``, for ``rows [..., parameters]``."""

    @abstractmethod
    def draw(self, noise: Tensor) -> Tensor:
        """Deviations from the mean ``[draws, parameters]`` from standard normal ``noise`` of that shape."""


class DiagonalPosterior(Posterior):
    """Independent parameters, ``variance [parameters]``."""

    def __init__(self, variance: Tensor) -> None:
        self.variance = variance

    def times(self, rows: Tensor) -> Tensor:
        return rows * self.variance

    def draw(self, noise: Tensor) -> Tensor:
        return noise * self.variance.sqrt()


class DensePosterior(Posterior):
    """The inverse of ``precision [parameters, parameters]``: exact, for a few thousand parameters."""

    def __init__(self, precision: Tensor) -> None:
        self._root, failed = torch.linalg.cholesky_ex(at_least_float32(precision))
        if failed.item():
            raise ConfigError(
                "the posterior's precision is not positive definite: the data leaves some directions undetermined; "
                "give a strength (L2 penalty) above 0"
            )

    def times(self, rows: Tensor) -> Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        solved: Tensor = torch.cholesky_solve(flat.T.to(self._root), self._root).T
        return solved.reshape(rows.shape).to(rows)

    def draw(self, noise: Tensor) -> Tensor:
        drawn: Tensor = torch.linalg.solve_triangular(self._root.T, noise.T.to(self._root), upper=True).T
        return drawn.to(noise)


def at_least_float32(matrix: Tensor) -> Tensor:
    """What torch can factorise: it has no factorisation of 16 bits."""
    return matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix


class KroneckerPosterior(Posterior):
    """K-FAC or EK-FAC: ``U (n Lambda + strength)^-1 U^T``; parameters outside its modules do not vary.

    Raises:
        ConfigError: the flat vector lacks a parameter of the curvature's modules.
    """

    def __init__(self, curvature: Curvature, flat: FlatModel, samples: int, strength: float) -> None:
        self._curvature = FlatCurvature(curvature, Flattener(flat.model, flat.names))
        self._samples = samples
        self._strength = strength
        weights = [self._curvature.name(tracked.module.weight) for tracked in self._curvature.modules]
        missing = [name for name in weights if name not in flat.names]
        if missing:
            raise ConfigError(f"the curvature has a module whose {missing[0]!r} is none of the chosen parameters")

    def times(self, rows: Tensor) -> Tensor:
        return self._mapped(lambda _, values: 1 / self._precision(values), rows)

    def draw(self, noise: Tensor) -> Tensor:
        return self._mapped(lambda _, values: self._precision(values) ** -0.5, noise)

    def _precision(self, eigenvalues: Tensor) -> Tensor:
        return self._samples * eigenvalues + self._strength

    def _mapped(self, f: Callable[[str, Tensor], Tensor], rows: Tensor) -> Tensor:
        return self._curvature.apply(f, rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)


def posterior_of(optimizer: Optimizer, flat: FlatModel, samples: int, strength: float | None = None) -> Posterior:
    """The covariance that an optimizer keeps anyway (table 1 of the paper).

    SGD: ``lr / n``, the same for all (one step's perturbation: good for rankings, too small for estimates of the
    leave-one-out loss). Adam, AdamW, RMSprop: ``1 / (n sqrt(v) + strength)`` with their average of squared gradients v
    (of whole batches, hence too small: the estimate follows the test loss from far above; Laplace's posteriors
    have its size).
    IVON (``pip install ivon-opt``): its own, ``1 / (ess (h + weight decay))``.

    Args:
        optimizer: in the midst of a training.
        flat: names the parameters.
        samples: n, how many samples the model is trained on.
        strength: of the L2 penalty on the *summed* loss; None for ``n x weight_decay`` of the optimizer.

    Raises:
        ConfigError: the optimizer is another one (lists the known), or has taken no step yet.
    """
    kind = type(optimizer).__name__
    if kind not in VARIANCES:
        raise ConfigError(
            f"the optimizer {kind!r} keeps no covariance that is known here; known are {', '.join(VARIANCES)}: use "
            "posterior='diagonal', 'kronecker' or 'dense' (Laplace)"
        )
    own = dict(flat.model.named_parameters())
    found: dict[nn.Parameter, Tensor] = {}
    for group in optimizer.param_groups:
        delta = samples * group.get("weight_decay", 0.0) if strength is None else strength
        found.update(VARIANCES[kind](optimizer, group, samples, delta))
    missing = next((name for name in flat.names if own[name] not in found), None)
    if missing is not None:
        raise ConfigError(f"the optimizer has no state for {missing!r} yet; take a step first, or let it train it")
    return DiagonalPosterior(flat.flatten({name: found[own[name]] for name in flat.names}))


Variances = Callable[[Optimizer, Mapping[str, Any], int, float], dict[nn.Parameter, Tensor]]


def _of_sgd(
    optimizer: Optimizer, group: Mapping[str, Any], samples: int, strength: float
) -> dict[nn.Parameter, Tensor]:
    return {p: torch.full_like(p, float(group["lr"]) / samples) for p in group["params"]}


def _of_squares(
    optimizer: Optimizer, group: Mapping[str, Any], samples: int, strength: float
) -> dict[nn.Parameter, Tensor]:
    found = {}
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" in state:
            square = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        elif "square_avg" in state:
            square = state["square_avg"]
        else:
            continue
        found[parameter] = 1 / (samples * (square.sqrt() + group["eps"]) + strength)
    return found


def _of_ivon(
    optimizer: Optimizer, group: Mapping[str, Any], samples: int, strength: float
) -> dict[nn.Parameter, Tensor]:
    variance = 1 / (group["ess"] * (group["hess"] + group["weight_decay"]))
    parts = variance.split([p.numel() for p in group["params"]])
    return {p: part.view(p.shape) for p, part in zip(group["params"], parts, strict=True)}


VARIANCES: Mapping[str, Variances] = {
    "SGD": _of_sgd,
    "Adam": _of_squares,
    "AdamW": _of_squares,
    "RMSprop": _of_squares,
    "IVON": _of_ivon,
}
"""By the optimizer's class name."""


def dense_laplace(flat: FlatModel, batches: Iterable[Batch], strength: float) -> DensePosterior:
    """The inverse of the summed Gauss-Newton matrix plus ``strength``, at the present weights.

    Raises:
        ConfigError: there are more parameters than one matrix can hold.
    """
    if flat.width > MOST_DENSE:
        raise ConfigError(
            f"the dense posterior of {flat.width:,} parameters is a matrix of so many lines; at most {MOST_DENSE:,} "
            "are taken: name fewer parameters= (the last layer, say), or take 'kronecker' or 'diagonal'"
        )
    theta = flat.theta
    total = strength * torch.eye(flat.width, dtype=at_least_float32(theta).dtype, device=theta.device)
    with differentiable(flat.model):
        for batch in batches:
            total = total + flat.gauss_newton(theta, batch)
    return DensePosterior(total)


def diagonal_laplace(flat: FlatModel, batches: Iterable[Batch], strength: float) -> DiagonalPosterior:
    """The inverse of the Gauss-Newton matrix's diagonal plus ``strength``, at the present weights."""
    theta = flat.theta
    total = torch.full_like(theta, strength)
    with differentiable(flat.model):
        for batch in batches:
            total = total + flat.gauss_newton_diagonal(theta, batch)
    if not bool((total > 0).all()):
        raise ConfigError("some parameters have no curvature at all; give a strength (L2 penalty) above 0")
    return DiagonalPosterior(1 / total)
