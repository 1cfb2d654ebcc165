"""SOURCE (Bae et al. 2024, arXiv 2405.12186): unrolling in closed form over segments of a training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from logix_like.errors import ConfigError, StoreError
from logix_like.estimators.along import as_ids
from logix_like.estimators.base import Estimator
from logix_like.estimators.flat import DataOf, checked, require_chunk, require_queries
from logix_like.estimators.segments import BACKENDS, Blocks, Spectrum
from logix_like.objective import Batch, Objective
from logix_like.path import StoredCheckpoint, TrainingPath
from logix_like.query.result import Ids
from logix_like.updates import common_settings, require_descent, rule_of
from logix_like.weights import load_weights, restored_weights


def gathered(eigenvalues: Tensor, amount: float) -> Tensor:
    """``(1 - exp(-amount s)) / s``: what a segment makes of a constant gradient; ``amount`` where ``s`` is 0.

    By ``expm1``, so that small ``amount s`` lose no digits (there it is ``amount``: TracIn); for large ones it is
    ``1 / s``, the influence function.
    """
    safe = torch.where(eigenvalues > 0, eigenvalues, 1.0)
    return torch.where(eigenvalues > 0, -torch.expm1(-amount * safe) / safe, amount)


def kept(eigenvalues: Tensor, amount: float) -> Tensor:
    """``exp(-amount s)``: what is left of an earlier change after a segment."""
    return torch.exp(-amount * eigenvalues)


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of the training over which curvature and gradients are taken as constant."""

    start: int
    """Number of its first step."""
    end: int
    """Number of the step behind its last."""
    amount: float
    """Step size times number of steps, the paper's ``eta K``."""
    decay: float
    """Weight decay, added to the eigenvalues."""
    checkpoints: tuple[StoredCheckpoint, ...]
    """Over which gradients and curvature are averaged."""

    def gathered(self, name: str, eigenvalues: Tensor) -> Tensor:
        """See :func:`gathered`."""
        return gathered(eigenvalues + self.decay, self.amount)

    def kept(self, name: str, eigenvalues: Tensor) -> Tensor:
        """See :func:`kept`."""
        return kept(eigenvalues + self.decay, self.amount)


class Source(Estimator):
    """Influence through a training that need not have converged, from its checkpoints.

    The training is cut into ``segments``; within one, the mean gradient of a sample and the curvature (Gauss-Newton,
    mean over the segment's checkpoints) are constant, so that its steps sum to a function of the eigenvalues
    (section 3, equations 14 to 16). Segments are chained by ``exp(-eta K s)``. With one segment and few steps this
    is TracInCP, with many steps the influence function.

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
        rate: step size to take for an adaptive optimizer, whose steps are no multiple of the gradient, or for groups
            of different rates. (Of the groups' weight decays the largest is taken.)
        chunk: samples whose gradients are taken together.

    Raises:
        StoreError: a segment holds no checkpoint.
        ModelMismatchError: the path was recorded with another model.
        ConfigError: the optimizer is adaptive, or its groups moved by different rates, and no ``rate`` is given.
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
        rate: float | None = None,
        chunk: int = 64,
    ) -> None:
        path.require_parameters({name: tuple(p.shape) for name, p in model.named_parameters()})
        if curvature not in BACKENDS:
            raise ConfigError(f"unknown curvature {curvature!r}; known: {', '.join(BACKENDS)}")
        require_descent(path.settings(path.first))
        self._path = path
        self._model = model
        self._data = checked(data)
        self._chunk = require_chunk(chunk)
        self._ids = path.data_id
        self._backend = BACKENDS[curvature](model, objective)
        self.segments = _segments(path, segments, rate)
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
                part = self._products(segment, spectrum.apply(segment.gathered, vectors))
                total = part if total is None else total + part
                vectors = spectrum.apply(segment.kept, vectors)
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
            at = [partial(self._at, segment) for segment in self.segments]
            self._spectra = [self._backend.fit(one, self._batches) for one in at]
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


def _segments(path: TrainingPath, count: int, rate: float | None) -> tuple[Segment, ...]:
    if not 1 <= count <= len(path.steps):
        raise ConfigError(f"segments is {count}; give a whole number from 1 to {len(path.steps)}, the number of steps")
    bounds = [path.first + len(path.steps) * number // count for number in range(count + 1)]
    size = _step_size(path, rate)
    segments = []
    for start, end in itertools.pairwise(bounds):
        inside = tuple(c for c in path.checkpoints if start <= c.step < end)
        if not inside:
            raise StoreError(
                f"steps {start} to {end - 1} make a segment, and there is no checkpoint among them; take checkpoints "
                "more often, or fewer segments"
            )
        steps = path.between(start, end).steps
        amount = sum(
            size(step.step) * sum(block.weight * len(block.data_id) for block in step.blocks) for step in steps
        )
        decays = {float(group["weight_decay"]) for step in steps for group in step.settings}
        segments.append(Segment(start, end, amount, max(decays), inside))
    return tuple(segments)


def _step_size(path: TrainingPath, rate: float | None) -> Callable[[int], float]:
    if rate is not None:
        if not rate > 0:
            raise ConfigError(f"rate is {rate}; a step size is a number above 0")
        return lambda step: rate
    rule = rule_of(path.optimizer)
    if rule.adaptive:
        raise ConfigError(
            f"the training used {path.optimizer}, whose steps are no multiple of the gradient, so that SOURCE's "
            "segments have no closed form in the curvature's eigenvectors; give rate=..., the step size of the SGD "
            "that it is to be taken for"
        )

    def size(step: int) -> float:
        groups = path.settings(step)
        return float(rule.rate({}, step, common_settings(groups, "SOURCE's segments", "give rate=...")))

    return size
