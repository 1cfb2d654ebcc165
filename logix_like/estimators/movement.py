"""How far an optimizer moved each weight for a unit of gradient: at a checkpoint, or over a stretch of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logix_like.errors import StoreError
from logix_like.path import Checkpoint, StoredCheckpoint, TrainingPath
from logix_like.updates import Hyper, UpdateRule, rule_of


@dataclass(frozen=True, eq=False)
class Movement:
    """What the steps of a stretch made of a constant gradient, weight by weight."""

    distance: Mapping[str, Tensor]
    """By parameter, in its shape: how far a unit of the samples' mean gradient moved each weight."""
    decay: Mapping[str, Tensor]
    """By parameter, in its shape: the part of each weight that weight decay took."""


def scale_at(rule: UpdateRule, checkpoint: Checkpoint, parameter: str, settings: Hyper) -> Tensor | float:
    """By which the optimizer multiplies its rate for each weight, in the parameter's shape or one number.

    1 where the optimizer is not adaptive; 0 where it is and has seen nothing yet.
    """
    if not rule.adaptive:
        return 1.0
    state = checkpoint.moments.get(parameter, {})
    if not state:
        return 0.0
    scale = rule.scale(state, int(state["step"]) if "step" in state else checkpoint.step, settings)
    assert scale is not None
    return scale


def movement_between(
    path: TrainingPath,
    start: int,
    end: int,
    checkpoints: Sequence[StoredCheckpoint],
    shapes: Mapping[str, Sequence[int]],
) -> Movement:
    """The movement of the steps ``start`` to ``end - 1``.

    An adaptive optimizer's scale is taken at ``checkpoints``: one over the mean of what it divides by, so that a weight
    which had seen no gradient at one of them does not stand for all.

    Raises:
        StoreError: an adaptive optimizer's state is at none of them.
    """
    rule = rule_of(path.optimizer)
    steps = path.between(start, end).steps
    shares = [sum(block.weight * len(block.data_id) for block in step.blocks) for step in steps]
    read = [stored.read() for stored in checkpoints] if rule.adaptive else []
    distance, decay = {}, {}
    for number, names in enumerate(path.groups):
        settings = [step.settings[number] for step in steps]
        rates = [rule.rate(one) for one in settings]
        moved = sum(rate * share for rate, share in zip(rates, shares, strict=True))
        pulled = sum(rate * rule.penalty(one) for rate, one in zip(rates, settings, strict=True))
        shrunk = sum(rule.shrinkage(one) for one in settings)
        for name in names:
            scale = _scale_over(rule, read, name, settings[0], shapes[name]) if rule.adaptive else 1.0
            ones = torch.ones(tuple(shapes[name]), dtype=torch.float64)
            distance[name] = moved * scale * ones
            decay[name] = (pulled * scale + shrunk) * ones
    return Movement(distance, decay)


def _scale_over(
    rule: UpdateRule, checkpoints: Sequence[Checkpoint], parameter: str, settings: Hyper, shape: Sequence[int]
) -> Tensor:
    seen = [c for c in checkpoints if c.moments.get(parameter)]
    if not seen:
        raise StoreError(
            f"the optimizer's state for {parameter!r} is at none of the checkpoints of steps "
            f"{', '.join(str(c.step) for c in checkpoints) or 'none'}, and an adaptive optimizer's steps are scaled by "
            "it; take checkpoints more often, or fewer segments"
        )
    slowness = sum(1 / torch.as_tensor(scale_at(rule, c, parameter, settings)).double() for c in seen)
    return (len(seen) / torch.as_tensor(slowness)).reshape(tuple(shape)).cpu()
