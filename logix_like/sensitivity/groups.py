"""What leaving a whole group of samples out does, e.g. a class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logix_like.errors import ConfigError
from logix_like.estimators.flat import FlatModel, batch_size
from logix_like.objective import Batch
from logix_like.sensitivity.posterior import Posterior
from logix_like.weights import differentiable


@dataclass(frozen=True)
class GroupEffect:
    """A group of samples, and the model without it, to first order."""

    group: Any
    """What the group is called."""
    samples: int
    """How many it has."""
    loss: float
    """Mean loss of its samples."""
    left_out_loss: float
    """Estimated mean loss of its samples under the model trained without them."""


Labels = Callable[[Batch], Iterable[Any]]
"""Tells each sample's group."""


def leave_groups_out(
    flat: FlatModel, posterior: Posterior, batches: Callable[[], Iterable[Batch]], groups: Labels
) -> list[GroupEffect]:
    """Each group's effect on its own samples: the weights move by ``S sum_j g_j`` (equation 14 of the paper).

    Two passes over the samples. A whole class is far outside what first order can tell: use the order of the
    effects, not their size.

    Raises:
        ConfigError: not every sample has a group, or there is none at the second pass.
    """
    theta = flat.theta
    with differentiable(flat.model):
        moves = {name: posterior.times(total) for name, total in _sums(flat, theta, batches(), groups).items()}
        found: dict[Any, list[tuple[Tensor, Tensor]]] = {name: [] for name in moves}
        for batch in batches():
            names, now = _names(groups, batch), flat.losses(theta, batch)
            for name in set(names):
                own = torch.tensor([one == name for one in names], device=theta.device)
                along = flat.outputs_along(theta, batch, moves[name].expand(len(names), -1))
                outputs = flat.outputs(theta, batch) + along
                after = flat.objective.likelihood.losses(outputs, flat.objective.labels(batch))
                found[name].append((now[own], after[own]))
    if not found or not all(found.values()):
        raise ConfigError(
            "the loader yielded no sample, or not the same ones twice; give the training samples, as something that "
            "can be read more than once (a generator cannot)"
        )
    effects = []
    for name, parts in found.items():
        before, after = (torch.cat([part[side] for part in parts]) for side in (0, 1))
        effects.append(GroupEffect(name, len(before), float(before.mean()), float(after.mean())))
    return effects


def _names(groups: Labels, batch: Batch) -> list[Any]:
    """Each sample's group, as something that is equal where the group is: the numbers of a tensor, not its parts."""
    found = groups(batch)
    names = found.tolist() if isinstance(found, Tensor) else list(found)
    if len(names) != batch_size(batch):
        raise ConfigError(f"groups named {len(names)} groups for {batch_size(batch)} samples; one for each is needed")
    return names


def _sums(flat: FlatModel, theta: Tensor, batches: Iterable[Batch], groups: Labels) -> dict[Any, Tensor]:
    """The summed gradient of each group, in the order of first appearance."""
    sums: dict[Any, Tensor] = {}
    for batch in batches:
        for name, row in zip(_names(groups, batch), flat.sample_gradients(theta, batch), strict=True):
            sums[name] = sums[name] + row if name in sums else row
    return sums
