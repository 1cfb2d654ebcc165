"""Taking the steps of a recorded training again, forwards or backwards, and seeing that they lead where they led."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from logix_like.errors import QueryError, StoreError
from logix_like.estimators.flat import DataOf, FlatModel
from logix_like.objective import Batch, Objective
from logix_like.path import Checkpoint, PathStep, TrainingPath
from logix_like.updates import Moments, rule_of

TOLERANCE = 1e-3
"""How far a replayed segment may end from the recorded checkpoint, as a share of the way between checkpoints.

Rounding in another order stays far below it in float32; other data, dropout or clipping do not.
"""


@dataclass(frozen=True, eq=False)
class Point:
    """The training before one of its steps."""

    step: PathStep
    """The step that is taken from here."""
    theta: Tensor
    """``[parameters]``."""
    moments: Moments
    """The optimizer's averages, each ``[parameters]``."""
    gradient: Tensor
    """``[parameters]``: what the optimizer sees."""
    taken: int
    """How many steps the optimizer has taken."""


class Replay:
    """A recorded training that can be walked.

    Raises:
        ModelMismatchError: the path was recorded with another model.
        ConfigError: the optimizer, or a setting of it, has no known rule.
        StoreError: the path does not begin at a checkpoint.
    """

    def __init__(self, path: TrainingPath, model: nn.Module, objective: Objective, data: DataOf) -> None:
        path.require_parameters({name: tuple(p.shape) for name, p in model.named_parameters()})
        self.path = path
        self.flat = FlatModel(model, objective, path.parameters)
        self.rule = rule_of(path.optimizer)
        for step in path.steps:
            for settings in step.settings:
                self.rule.check(settings)
        self._data = data
        self._sizes = [sum(p.numel() for p in map(model.get_parameter, group)) for group in path.groups]
        self._starts = [c for c in path.checkpoints if path.first <= c.step <= path.end]
        if not self._starts or self._starts[0].step != path.first:
            raise StoreError(
                f"the path begins at step {path.first} and its first checkpoint is of step "
                f"{self._starts[0].step if self._starts else 'none'}; a replay needs the weights it begins with"
            )
        self._offset = _steps_before(self._starts[0].read())

    @property
    def longest_segment(self) -> int:
        """Most steps between two checkpoints."""
        bounds = [c.step for c in self._starts if c.step < self.path.end] + [self.path.end]
        return max(after - before for before, after in itertools.pairwise(bounds))

    @property
    def backward_bytes(self) -> int:
        """Memory that walking backwards takes: weights, gradient and moments of every step of the longest segment."""
        itemsize = self.flat.theta.element_size()
        return self.longest_segment * self.flat.width * (2 + len(self.rule.moments)) * itemsize

    def forwards(self) -> Iterator[Point]:
        """Every step in order."""
        for start, end in self._segments():
            yield from self._segment(start, end)

    def backwards(self) -> Iterator[Point]:
        """Every step, the last first; between two checkpoints all points are kept."""
        for start, end in reversed(self._segments()):
            points = list(self._segment(start, end))
            while points:
                yield points.pop()

    def end(self) -> Tensor:
        """``[parameters]`` behind the last step."""
        last = self._starts[-1]
        if last.step == self.path.end:
            return self._theta(last.read())
        start, end = self._segments()[-1]
        *_, point = self._segment(start, end)
        return self.step(point.theta, point.gradient, point.moments, point)[0]

    def step(
        self, theta: Tensor, gradient: Tensor, moments: Moments, point: Point, *, fixed_scale: bool = False
    ) -> tuple[Tensor, Moments]:
        """The optimizer's step at ``point``, from these weights, gradient and moments."""
        parts = [
            self.rule.step(t, g, m, point.taken, settings, fixed_scale=fixed_scale)
            for t, g, m, settings in zip(
                theta.split(self._sizes),
                gradient.split(self._sizes),
                self._split(moments),
                point.step.settings,
                strict=True,
            )
        ]
        return torch.cat([t for t, _ in parts]), {
            name: torch.cat([m[name] for _, m in parts]) for name in self.rule.moments
        }

    def pull(
        self, point: Point, theta: Tensor, moments: Moments, *, fixed_scale: bool
    ) -> tuple[Tensor, Tensor, Moments]:
        """Derivatives behind a step as derivatives before it: by weights, gradient and moments.

        ``theta`` and every moment are ``[queries, parameters]``: derivatives of something by the step's results.
        """

        def step(t: Tensor, g: Tensor, m: Moments) -> tuple[Tensor, Moments]:
            return self.step(t, g, m, point, fixed_scale=fixed_scale)

        pull = torch.func.vjp(step, point.theta, point.gradient, point.moments)[1]
        pulled: tuple[Tensor, Tensor, Moments] = torch.func.vmap(pull)((theta, moments))
        return pulled

    def push(self, point: Point, theta: Tensor, gradient: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """Derivatives of a step's inputs by something, ``[samples, parameters]``, as those of its results."""

        def step(t: Tensor, g: Tensor, m: Moments) -> tuple[Tensor, Moments]:
            return self.step(t, g, m, point)

        inputs = (point.theta, point.gradient, point.moments)
        derived = torch.func.vjp(step, *inputs)
        # What is pulled is linear in what is pushed: its own derivative is the way forwards, for any operation.
        push = torch.func.vjp(derived[1], derived[0])[1]
        pushed: tuple[tuple[Tensor, Moments]] = torch.func.vmap(push)((theta, gradient, moments))
        return pushed[0]

    def batches(self, step: PathStep) -> list[tuple[Batch, float]]:
        """The batches of a step, each with the weight of its samples."""
        return [(self._data(block.data_id), block.weight) for block in step.blocks]

    def zeros(self, rows: int) -> Moments:
        """Derivatives by the moments that are all 0, ``[rows, parameters]`` each."""
        theta = self.flat.theta
        return {name: theta.new_zeros(rows, self.flat.width) for name in self.rule.moments}

    def _segments(self) -> list[tuple[int, int]]:
        """Which checkpoint each segment begins at, and the step behind its last."""
        bounds = [c.step for c in self._starts] + ([self.path.end] if self._starts[-1].step < self.path.end else [])
        return [(number, end) for number, end in enumerate(bounds[1:])]

    def _segment(self, number: int, end: int) -> Iterator[Point]:
        checkpoint = self._starts[number].read()
        start = theta = self._theta(checkpoint)
        moments = self._moments(checkpoint)
        for step in self.path.between(checkpoint.step, end).steps:
            gradients = [weight * self.flat.gradient(theta, batch) for batch, weight in self.batches(step)]
            gradient = torch.stack(gradients).sum(0) if gradients else torch.zeros_like(theta)
            point = Point(step, theta, moments, gradient, step.step + self._offset)
            yield point
            theta, moments = self.step(theta, gradient, moments, point)
        if number + 1 < len(self._starts):
            self._require_same(start, theta, self._theta(self._starts[number + 1].read()), checkpoint.step, end)

    def _require_same(self, start: Tensor, found: Tensor, recorded: Tensor, first: int, end: int) -> None:
        away = float((found - recorded).norm() / (recorded - start).norm().clamp_min(1e-12))
        if not away <= TOLERANCE:
            raise QueryError(
                f"the replay of steps {first} to {end - 1} ends {away:.1%} of the way off the recorded checkpoint, "
                "so it is not the training that was recorded: give the model, the objective and the data (same order, "
                "same transformations) of the training; dropout, batch normalisation, gradient clipping, mixed "
                "precision and random augmentation cannot be replayed"
            )

    def _theta(self, checkpoint: Checkpoint) -> Tensor:
        return self.flat.flatten(checkpoint.weights)

    def _moments(self, checkpoint: Checkpoint) -> Moments:
        if self.rule.moments and not checkpoint.moments and self._uses_moments and checkpoint.step > self.path.first:
            raise StoreError(
                f"the checkpoint of step {checkpoint.step} holds no state of the optimizer; take checkpoints within "
                "the run that records the path"
            )
        own = self.flat.tensors(self.flat.theta)
        return {
            key: self.flat.flatten(
                {
                    name: checkpoint.moments.get(name, {}).get(key, torch.zeros_like(value))
                    for name, value in own.items()
                }
            )
            for key in self.rule.moments
        }

    @property
    def _uses_moments(self) -> bool:
        """Whether the optimizer keeps any: plain SGD does not."""
        return self.path.optimizer != "SGD" or any(group["momentum"] for group in self.path.steps[0].settings)

    def _split(self, moments: Moments) -> list[Moments]:
        parts = {name: moment.split(self._sizes) for name, moment in moments.items()}
        return [{name: part[number] for name, part in parts.items()} for number in range(len(self._sizes))]


def _steps_before(checkpoint: Checkpoint) -> int:
    """How many steps the optimizer had taken beyond those that the run counts."""
    counts = [int(state["step"]) for state in checkpoint.moments.values() if "step" in state]
    had = any("momentum_buffer" in state for state in checkpoint.moments.values())
    return (counts[0] if counts else max(checkpoint.step, int(had))) - checkpoint.step
