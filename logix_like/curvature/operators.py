"""Products with the Hessian and the Gauss-Newton matrix of a model's parameters, by ``torch.func``."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp

from logix_like.curvature.sweep import Losses, on_device, require_losses
from logix_like.errors import StatisticsError
from logix_like.objective import Batch, Objective, bound
from logix_like.weights import Flattener, differentiable


class Operator(ABC):
    """The mean over samples of one curvature matrix of the objective, as products."""

    def __init__(self, model: nn.Module, objective: Objective, flattener: Flattener) -> None:
        self._model = model
        self._objective = objective
        self._flattener = flattener

    def sum(self, batch: Batch, vectors: Tensor) -> Tensor:
        """``sum_i H_i v`` over the samples of a batch, for each of ``vectors [n, size]``."""
        with differentiable(self._model):
            return self._sum(on_device(batch, self._flattener.device), vectors)

    def samples(self, batch: Batch) -> int:
        """How many samples a batch has."""
        return len(self._objective.labels(batch))

    def mean(self, batches: Iterable[Batch], vectors: Tensor) -> Tensor:
        """``H v`` over all samples."""
        total, count = torch.zeros_like(vectors), 0
        for number, batch in enumerate(batches, start=1):
            part = self.sum(batch, vectors)
            if bool(vectors.isfinite().all()) and not bool(part.isfinite().all()):
                raise StatisticsError(
                    f"the curvature is not finite in batch {number} of the loader: outputs or losses of a sample are "
                    "not, or overflow; leave such samples out"
                )
            total += part
            count += self.samples(batch)
        if not count:
            raise StatisticsError(
                "there are no samples to take the curvature of: the loader yielded no batch (a generator is spent "
                "after one pass: give a list or a DataLoader)"
            )
        return total / count

    @abstractmethod
    def _sum(self, batch: Batch, vectors: Tensor) -> Tensor: ...


class GaussNewton(Operator):
    """``J^T L J``, ``L`` the losses' Hessian in the outputs: never negative, the Fisher of exponential families."""

    def _sum(self, batch: Batch, vectors: Tensor) -> Tensor:
        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return self._objective.forward(bound(self._model, parameters), batch)

        flattener, targets = self._flattener, self._objective.labels(batch)
        found, pull = _vjp(outputs, flattener.parameters)
        products = []
        for vector in vectors:
            pushed = _jvp(outputs, flattener.parameters, flattener.split(vector))
            (back,) = pull(self._objective.likelihood.hessian_product(found, targets, pushed))
            products.append(flattener.join(back))
        return torch.stack(products).to(vectors)


class Hessian(Operator):
    """The Hessian itself, which need not be positive away from a minimum."""

    def _sum(self, batch: Batch, vectors: Tensor) -> Tensor:
        def total(parameters: dict[str, Tensor]) -> Tensor:
            return self._objective.losses(bound(self._model, parameters), batch).sum()

        flattener, gradient = self._flattener, grad(total)
        products = [flattener.join(_jvp(gradient, flattener.parameters, flattener.split(vector))) for vector in vectors]
        return torch.stack(products).to(vectors)


OPERATORS: Mapping[str, type[Operator]] = {"ggn": GaussNewton, "hessian": Hessian}
"""By the name that a user gives."""


def sample_gradients(model: nn.Module, flattener: Flattener, batch: Batch, losses: Losses, samples: int) -> Tensor:
    """``[samples, size]``: one backward pass for each sample."""
    with differentiable(model):
        values, pull = _vjp(lambda p: losses(bound(model, p), batch), flattener.parameters)
        require_losses(values, samples)
        units = torch.eye(len(values), dtype=values.dtype, device=values.device)
        return torch.stack([flattener.join(pull(unit)[0]) for unit in units])


def directional_derivatives(
    model: nn.Module, flattener: Flattener, batch: Batch, losses: Losses, vectors: Tensor
) -> Tensor:
    """``[n, samples]``: ``g_i . v`` for each of ``vectors [n, size]``, without forming any ``g_i``."""

    def values(parameters: dict[str, Tensor]) -> Tensor:
        return losses(bound(model, parameters), batch)

    with differentiable(model):
        return torch.stack([_jvp(values, flattener.parameters, flattener.split(v)) for v in vectors])


def _vjp(function: Callable[[Any], Tensor], at: dict[str, Tensor]) -> tuple[Tensor, Callable[[Tensor], Any]]:
    found: Any = vjp(function, at)
    return found[0], found[1]


def _jvp(function: Callable[[Any], Any], at: dict[str, Tensor], along: dict[str, Tensor]) -> Any:
    _load_forward_mode()
    found: Any = jvp(function, (at,), (along,))
    return found[1]


@cache
def _load_forward_mode() -> None:
    with warnings.catch_warnings():  # torch warns of its own use of torch.jit when it first loads the rules
        warnings.simplefilter("ignore", FutureWarning)
        jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
