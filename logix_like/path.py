"""A recorded training: which samples each optimizer step used, with what settings, from which weights.

What is recorded is enough to take every step again (:mod:`logix_like.estimators.replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from logix_like.errors import ModelMismatchError, StoreError
from logix_like.layout import DataId

OPTIMIZER = "@optimizer/"
"""What the names of an optimizer's moments begin with in a checkpoint; no parameter of a model can be called so."""


@dataclass(frozen=True)
class PathBlock:
    """Samples that went through the model together."""

    data_id: tuple[DataId, ...]
    """In the order of the batch."""
    weight: float
    """What each sample's own gradient was multiplied by in the gradient that the optimizer saw (1 / batch size)."""


@dataclass(frozen=True)
class PathStep:
    """One optimizer step."""

    step: int
    """Its number: how many were taken before it."""
    epoch: int
    """Epoch, -1 if it was never told."""
    blocks: tuple[PathBlock, ...]
    """What its gradient is made of: one block, or several under gradient accumulation."""
    settings: tuple[Mapping[str, Any], ...]
    """Settings of each parameter group as they were in the step (``lr``, ``momentum``, ``weight_decay``, ...)."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model and its optimizer at one moment of the training."""

    step: int
    """How many optimizer steps were taken before it."""
    epoch: int
    """Epoch, -1 if it was never told."""
    weights: Mapping[str, Tensor]
    """Parameters and buffers by ``state_dict`` name."""
    moments: Mapping[str, Mapping[str, Tensor]]
    """The optimizer's state: by parameter, then by torch's name (``exp_avg``, ...); empty if it was not recorded."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], step: int, epoch: int) -> Checkpoint:
        """From the tensors of a checkpoint's file."""
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(OPTIMIZER):
                parameter, _, key = name.removeprefix(OPTIMIZER).rpartition("/")
                moments.setdefault(parameter, {})[key] = tensor
        weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(OPTIMIZER)}
        return cls(step, epoch, weights, moments)


@dataclass(frozen=True, eq=False)
class StoredCheckpoint:
    """Where a checkpoint is, read when it is asked for."""

    number: int
    """Its number in the store, from 1."""
    step: int
    """How many optimizer steps were taken before it."""
    read: Callable[[], Checkpoint]


@dataclass(frozen=True, eq=False)
class TrainingPath:
    """All steps of a training in order, and the checkpoints between them."""

    optimizer: str
    """Class name of the optimizer."""
    groups: tuple[tuple[str, ...], ...]
    """Names of the parameters in each of its groups."""
    steps: tuple[PathStep, ...]
    """Without a gap."""
    checkpoints: tuple[StoredCheckpoint, ...]
    """By step; where several are of one step, the last."""

    @property
    def first(self) -> int:
        """Number of the first step."""
        return self.steps[0].step

    @property
    def end(self) -> int:
        """Number behind the last step."""
        return self.steps[-1].step + 1

    @property
    def data_id(self) -> tuple[DataId, ...]:
        """Every sample that was used, in the order of first use."""
        return tuple(dict.fromkeys(i for step in self.steps for block in step.blocks for i in block.data_id))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all trained parameters, group by group."""
        return tuple(name for group in self.groups for name in group)

    def settings(self, step: int) -> tuple[Mapping[str, Any], ...]:
        """Settings of each group at the step with this number (the last step's behind the end)."""
        return self.steps[min(max(step - self.first, 0), len(self.steps) - 1)].settings

    def settings_for(self, parameter: str, step: int) -> Mapping[str, Any]:
        """Settings of the group that holds a parameter, at the step with this number."""
        group = next(number for number, names in enumerate(self.groups) if parameter in names)
        return self.settings(step)[group]

    def require_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise :class:`ModelMismatchError` unless a model with parameters of these shapes was trained on this path."""
        missing = next((name for name in self.parameters if name not in shapes), None)
        if missing is not None:
            raise ModelMismatchError(
                f"the path was recorded with a model that has a parameter {missing!r}, this one has none; use "
                "the model that was trained"
            )
        regrouped = next((step.step for step in self.steps if len(step.settings) != len(self.groups)), None)
        if regrouped is not None:
            raise StoreError(
                f"at step {regrouped} the optimizer had other parameter groups than when the path began "
                f"({len(self.groups)} are recorded): give it all groups from the first step on (with a learning rate "
                "of 0 for those that wait), or record each stage as a run of its own"
            )
        if not self.checkpoints:
            raise StoreError("the path holds no checkpoint; record with 'record: path' from the first step on")
        weights = self.checkpoints[0].read().weights
        for name in self.parameters:
            if name not in weights or tuple(weights[name].shape) != shapes[name]:
                found = tuple(weights[name].shape) if name in weights else "missing"
                raise ModelMismatchError(
                    f"parameter {name!r} has the shape {shapes[name]} in this model and {found} on the path; use the "
                    "model that was trained"
                )

    def between(self, start: int, end: int) -> TrainingPath:
        """The part of the path with steps ``start`` to ``end - 1`` and the checkpoints in it, ends included."""
        return replace(
            self,
            steps=tuple(step for step in self.steps if start <= step.step < end),
            checkpoints=tuple(c for c in self.checkpoints if start <= c.step <= end),
        )
