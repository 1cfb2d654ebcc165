"""SOURCE (Bae et al. 2024, arXiv 2405.12186): unrolling in closed form over segments of a training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from logix_like.errors import ConfigError, StoreError
from logix_like.estimators.along import as_ids
from logix_like.estimators.base import Estimator
from logix_like.estimators.flat import DataOf, checked, require_chunk, require_queries
from logix_like.estimators.movement import Movement, movement_between
from logix_like.estimators.segments import Backend, Blocks, DenseBackend, Spectrum
from logix_like.estimators.segments_kronecker import KroneckerBackend
from logix_like.objective import Batch, Objective
from logix_like.path import StoredCheckpoint, TrainingPath
from logix_like.query.result import Ids
from logix_like.updates import require_descent
from logix_like.weights import load_weights, restored_weights

BACKENDS: Mapping[str, Callable[[nn.Module, Objective, Sequence[str]], Backend]] = {
    "ekfac": KroneckerBackend,
    "dense": DenseBackend,
}
"""By the curvature's name."""


def kept(eigenvalues: Tensor, steps: float = math.inf) -> Tensor:
    """``(1 - s / K)^K``: what ``K`` steps leave of an earlier change; ``exp(-s)`` for many small ones."""
    return torch.exp(-eigenvalues) if math.isinf(steps) else (1 - eigenvalues / steps) ** steps


def gathered(eigenvalues: Tensor, steps: float = math.inf) -> Tensor:
    """``(1 - kept(s)) / s``: what a segment makes of a constant gradient; 1 where ``s`` is 0.

    By ``expm1``, so that small ``s`` lose no digits (there it is 1: TracIn); for large ones it is ``1 / s``, the
    influence function.
    """
    safe = torch.where(eigenvalues > 0, eigenvalues, 1.0)
    if math.isinf(steps):
        lost = -torch.expm1(-safe)
    else:
        small = torch.log1p(-safe.clamp_max(steps / 2) / steps)
        lost = torch.where(safe < steps / 2, -torch.expm1(steps * small), 1 - kept(safe, steps))
    return torch.where(eigenvalues > 0, lost / safe, 1.0)


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of the training over which curvature and gradients are taken as constant."""

    start: int
    """Number of its first step."""
    end: int
    """Number of the step behind its last."""
    checkpoints: tuple[StoredCheckpoint, ...]
    """Over which gradients and curvature are averaged."""
    movement: Movement
    """How far its steps moved each weight for a unit of gradient, the paper's ``eta K``, and weight decay."""


class Source(Estimator):
    """Influence through a training that need not have converged, from its checkpoints.

    The training is cut into ``segments``; within one, the mean gradient of a sample and the curvature (Gauss-Newton,
    mean over the segment's checkpoints) are constant, so that its steps sum to a function of the eigenvalues
    (section 3, equations 14 to 16). Segments are chained by ``exp(-eta K s)``. With one segment and few steps this
    is TracInCP, with many steps the influence function.

    Parameter groups may differ in rate and weight decay, and Adam, AdamW and RMSprop count with the step size that
    they gave each weight, from their recorded second moments: curvature and gradients are those in the coordinates in
    which the optimizer's steps are gradient descent's (the eigenvectors of ``R^1/2 H R^1/2``, ``R`` the distances).
    ``dense`` takes ``R`` as it is, ``ekfac`` as an outer product in each layer.

    Sign: a positive score means that training on the sample lowered the query's loss (a proponent, helpful);
    negative, that it raised it (an opponent, harmful). A score is the estimated rise of the query's loss without the
    sample. A query is a batch of data, its gradient taken at the last checkpoint.

    Args:
        path: the recorded training, ``run.training_path``, with some checkpoints in every segment.
        model: the model that was trained.
        objective: what it was trained for.
        data: gives the batch of some ids.
        segments: how many; the paper takes 3.
        curvature: ``ekfac``, or ``dense`` for models of a few thousand parameters.
        discrete: count a segment's steps, ``(1 - (1 - s / K)^K) / s``, instead of taking them as many small ones:
            exact for plain gradient descent on a quadratic, wild where a step overshoots (``s / K > 2``).
        chunk: samples whose gradients are taken together.

    Raises:
        StoreError: a segment holds no checkpoint, or none with an adaptive optimizer's state.
        ModelMismatchError: the path was recorded with another model.
        ConfigError: the optimizer has no known update rule (lists the known).
    """

    name: ClassVar[str] = "SOURCE"

    def __init__(
        self,
        path: TrainingPath,
        model: nn.Module,
        objective: Objective,
        data: DataOf,
        *,
        segments: int = 3,
        curvature: Literal["ekfac", "dense"] = "ekfac",
        discrete: bool = False,
        chunk: int = 64,
    ) -> None:
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        path.require_parameters(shapes)
        if curvature not in BACKENDS:
            raise ConfigError(f"unknown curvature {curvature!r}; known: {', '.join(BACKENDS)}")
        require_descent(path.settings(path.first))
        self._path = path
        self._model = model
        self._data = checked(data)
        self._chunk = require_chunk(chunk)
        self._discrete = discrete
        self._ids = path.data_id
        self._backend = BACKENDS[curvature](model, objective, path.parameters)
        self.segments = _segments(path, segments, shapes)
        """The parts of the training, in order."""
        self._spectra: list[Spectrum] | None = None

    @property
    def data_id(self) -> Ids:
        return as_ids(self._ids)

    def scores(self, queries: Batch) -> Tensor:
        """``[queries, samples]``; the curvatures are fitted at the first call."""
        with restored_weights(self._model):
            load_weights(self._model, self._path.checkpoints[-1].read().weights)
            vectors = self._backend.gradients(require_queries(queries))
            total = None
            for segment, spectrum in reversed(list(zip(self.segments, self._fitted(), strict=True))):
                steps = float(segment.end - segment.start) if self._discrete else math.inf
                part = self._products(segment, spectrum.moved(partial(gathered, steps=steps), vectors))
                total = part if total is None else total + part
                vectors = spectrum.kept(partial(kept, steps=steps), vectors)
        assert total is not None
        return total / len(self._ids)

    def self_influence(self) -> Tensor:
        """``[samples]``: every sample asked about itself, ``chunk`` at a time, each a pass over all samples."""
        found = []
        for start in range(0, len(self._ids), self._chunk):
            ids = self._ids[start : start + self._chunk]
            found.append(self.scores(self._data(ids))[:, start : start + len(ids)].diagonal())
        return torch.cat(found)

    def _fitted(self) -> list[Spectrum]:
        if self._spectra is None:
            self._spectra = [
                self._backend.fit(partial(self._at, segment), self._batches, segment.movement)
                for segment in self.segments
            ]
        return self._spectra

    def _products(self, segment: Segment, vectors: Blocks) -> Tensor:
        """``[queries, samples]``: vectors times the samples' gradients, mean over the segment's checkpoints."""
        total = torch.zeros(())
        for _ in self._at(segment):
            total = total + torch.cat([self._backend.products(vectors, batch) for batch in self._batches()], 1)
        return total / len(segment.checkpoints)

    def _at(self, segment: Segment) -> Iterator[None]:
        for checkpoint in segment.checkpoints:
            load_weights(self._model, checkpoint.read().weights)
            yield

    def _batches(self) -> Iterable[Batch]:
        for start in range(0, len(self._ids), self._chunk):
            yield self._data(self._ids[start : start + self._chunk])


def _segments(path: TrainingPath, count: int, shapes: Mapping[str, Sequence[int]]) -> tuple[Segment, ...]:
    if not 1 <= count <= len(path.steps):
        raise ConfigError(f"segments is {count}; give a whole number from 1 to {len(path.steps)}, the number of steps")
    bounds = [path.first + len(path.steps) * number // count for number in range(count + 1)]
    segments = []
    for start, end in itertools.pairwise(bounds):
        inside = tuple(c for c in path.checkpoints if start <= c.step < end)
        if not inside:
            raise StoreError(
                f"steps {start} to {end - 1} make a segment, and there is no checkpoint among them; take checkpoints "
                "more often, or fewer segments"
            )
        # A step is scaled by the second moments behind it.
        behind = [c for c in path.checkpoints if start < c.step <= end] or inside
        segments.append(Segment(start, end, inside, movement_between(path, start, end, behind, shapes)))
    return tuple(segments)
