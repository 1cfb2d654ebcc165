"""Curvature and gradients of a segment of training, for SOURCE; dense here, Kronecker-factored beside.

With ``R`` the distance by which a unit of gradient moved each weight over the segment, ``H`` the mean curvature and
``D`` the part of each weight that decay took, a constant gradient ``g`` moved the weights by ``R^1/2 F(M) R^1/2 g``,
and the segment left ``R^1/2 K(M) R^-1/2`` times an earlier change, where ``M = R^1/2 H R^1/2 + D``,
``F(s) = (1 - exp(-s)) / s`` and ``K(s) = exp(-s)``. For SGD ``R`` is one number, the paper's ``eta K``; for Adam it
is another one for each weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from logix_like.estimators.flat import FlatModel, batch_size
from logix_like.estimators.movement import Movement
from logix_like.objective import Batch, Objective
from logix_like.weights import differentiable

Blocks = Mapping[str, Tensor]
"""By block of the curvature: ``[n, ...]``, n gradients or vectors like them."""

Function = Callable[[Tensor], Tensor]
"""Of eigenvalues, elementwise."""

At = Callable[[], Iterable[object]]
"""Loads one set of weights after another into the model."""


class Spectrum(ABC):
    """``M`` of a segment by its eigenvectors."""

    @abstractmethod
    def moved(self, f: Function, vectors: Blocks) -> dict[str, Tensor]:
        """``R^1/2 f(M) R^1/2 vectors``."""

    @abstractmethod
    def kept(self, f: Function, vectors: Blocks) -> dict[str, Tensor]:
        """``R^-1/2 f(M) R^1/2 vectors``; a weight that never moved keeps what it has."""


class Backend(ABC):
    """Gradients and curvatures of a model at the weights that it has when they are asked for."""

    @abstractmethod
    def fit(self, at: At, batches: Callable[[], Iterable[Batch]], movement: Movement) -> Spectrum:
        """Of the Gauss-Newton matrix, mean over the batches' samples and over the weights that ``at`` loads."""

    @abstractmethod
    def gradients(self, batch: Batch) -> Blocks:
        """Each sample's own gradient."""

    @abstractmethod
    def products(self, vectors: Blocks, batch: Batch) -> Tensor:
        """``[vectors, batch]``: inner products of vectors and the samples' gradients."""


class DenseBackend(Backend):
    """All parameters, one matrix ``[parameters, parameters]``: exact, for models of a few thousand parameters."""

    def __init__(self, model: nn.Module, objective: Objective, parameters: Sequence[str]) -> None:
        self._model = model
        self._flat = FlatModel(model, objective, parameters)

    def fit(self, at: At, batches: Callable[[], Iterable[Batch]], movement: Movement) -> Spectrum:
        total, count = torch.zeros(()), 0
        for _ in at():
            with differentiable(self._model):
                for batch in batches():
                    total = total + self._flat.gauss_newton(self._flat.theta, batch)
                    count += batch_size(batch)
        distance, decay = (self._flat.flatten(part) for part in (movement.distance, movement.decay))
        return DenseSpectrum(total / count, distance.to(total), decay.to(total))

    def gradients(self, batch: Batch) -> Blocks:
        with differentiable(self._model):
            return {"": self._flat.sample_gradients(self._flat.theta, batch)}

    def products(self, vectors: Blocks, batch: Batch) -> Tensor:
        return vectors[""] @ self.gradients(batch)[""].T


class DenseSpectrum(Spectrum):
    """Of a curvature ``[n, n]`` with the distance and the decay ``[n]`` of each weight."""

    def __init__(self, curvature: Tensor, distance: Tensor, decay: Tensor) -> None:
        self._root = distance.sqrt()
        values, self._vectors = torch.linalg.eigh(self._root[:, None] * curvature * self._root + decay.diag())
        self._values = values.clamp_min(0)  # a Gauss-Newton matrix; below 0 is rounding

    def moved(self, f: Function, vectors: Blocks) -> dict[str, Tensor]:
        return {name: self._between(f, vector) * self._root for name, vector in vectors.items()}

    def kept(self, f: Function, vectors: Blocks) -> dict[str, Tensor]:
        back = inverse_root(self._root)
        return {name: v + self._between(lambda s: f(s) - 1, v) * back for name, v in vectors.items()}

    def _between(self, f: Function, vector: Tensor) -> Tensor:
        found: Tensor = (((vector * self._root) @ self._vectors) * f(self._values)) @ self._vectors.T
        return found


def inverse_root(root: Tensor) -> Tensor:
    """One over each, 0 where it is 0."""
    return torch.where(root > 0, 1 / root.clamp_min(torch.finfo(root.dtype).tiny), 0.0)
