"""Curvature and gradients of a segment of training, dense or Kronecker-factored, for SOURCE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from logix_like.curvature import default_selection, fit_curvature
from logix_like.curvature.gradients import Gradients, InnerProducts
from logix_like.curvature.sweep import Sweep
from logix_like.estimators.flat import FlatModel, batch_size, differentiable
from logix_like.objective import Batch, Objective

Blocks = Mapping[str, Tensor]
"""By block of the curvature: ``[n, ...]``, n gradients or vectors like them."""

OfEigenvalues = Callable[[str, Tensor], Tensor]
"""Takes a block's name and its eigenvalues, gives as many numbers."""


class Spectrum(Protocol):
    """A curvature by its eigenvectors."""

    def apply(self, f: OfEigenvalues, vectors: Blocks) -> dict[str, Tensor]:
        """``U f(eigenvalues) U^T vectors``."""
        ...


class Backend(ABC):
    """Gradients and curvatures of a model at the weights that it has when they are asked for."""

    @abstractmethod
    def fit(self, at: Callable[[], Iterable[object]], batches: Callable[[], Iterable[Batch]]) -> Spectrum:
        """The Gauss-Newton matrix, mean over the batches' samples and over the weights that ``at`` loads."""

    @abstractmethod
    def gradients(self, batch: Batch) -> Blocks:
        """Each sample's own gradient."""

    @abstractmethod
    def products(self, vectors: Blocks, batch: Batch) -> Tensor:
        """``[vectors, batch]``: inner products of vectors and the samples' gradients."""


class KroneckerBackend(Backend):
    """EK-FAC (George 2018) of all linear maps, by :mod:`logix_like.curvature`; other parameters take no part."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._model = model
        self._objective = objective
        self._selection = default_selection(model)
        self._sweep = Sweep(model, objective, self._selection)

    def fit(self, at: Callable[[], Iterable[object]], batches: Callable[[], Iterable[Batch]]) -> Spectrum:
        loader = _Again(batches)
        return fit_curvature(self._model, loader, self._objective, selection=self._selection, at=at, progress=False)

    def gradients(self, batch: Batch) -> Blocks:
        sink = Gradients()
        self._sweep.run(batch, self._objective.backward_losses, sink)
        return sink.blocks

    def products(self, vectors: Blocks, batch: Batch) -> Tensor:
        sink = InnerProducts(vectors)
        self._sweep.run(batch, self._objective.backward_losses, sink)
        return torch.stack(list(sink.modules.values())).sum(0)


class DenseBackend(Backend):
    """All parameters, one matrix ``[parameters, parameters]``: exact, for models of a few thousand parameters."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._model = model
        self._flat = FlatModel(model, objective)

    def fit(self, at: Callable[[], Iterable[object]], batches: Callable[[], Iterable[Batch]]) -> Spectrum:
        total, count = torch.zeros(()), 0
        for _ in at():
            with differentiable(self._model):
                for batch in batches():
                    total = total + self._flat.gauss_newton(self._flat.theta, batch)
                    count += batch_size(batch)
        return DenseSpectrum(*torch.linalg.eigh(total / count))

    def gradients(self, batch: Batch) -> Blocks:
        with differentiable(self._model):
            return {"": self._flat.sample_gradients(self._flat.theta, batch)}

    def products(self, vectors: Blocks, batch: Batch) -> Tensor:
        return vectors[""] @ self.gradients(batch)[""].T


class DenseSpectrum:
    """Eigenvalues ``[n]`` and eigenvectors ``[n, n]`` (columns) of one symmetric matrix."""

    def __init__(self, eigenvalues: Tensor, eigenvectors: Tensor) -> None:
        self.eigenvalues = eigenvalues.clamp_min(0)  # a Gauss-Newton matrix; below 0 is rounding
        self._vectors = eigenvectors

    def apply(self, f: OfEigenvalues, vectors: Blocks) -> dict[str, Tensor]:
        """``U f(eigenvalues) U^T vectors``."""
        return {
            name: ((vector @ self._vectors) * f(name, self.eigenvalues)) @ self._vectors.T
            for name, vector in vectors.items()
        }


class _Again:
    """Batches that can be read again and again."""

    def __init__(self, read: Callable[[], Iterable[Batch]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._read())


BACKENDS: Mapping[str, Callable[[nn.Module, Objective], Backend]] = {"ekfac": KroneckerBackend, "dense": DenseBackend}
"""By the curvature's name."""
