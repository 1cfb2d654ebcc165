"""Steps that a ``GradScaler`` skips: their rows are flagged, since no such step was ever taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from logix_like.capture.batch import ProjectedBatch


def overflowed(model: nn.Module, scaler: Any) -> bool | None:
    """Whether a gradient that ``model`` holds is not finite, so that the scaler will skip the step.

    None without a scaler (or with a disabled one), where nothing is ever skipped.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    gradients = [_local(p.grad) for p in model.parameters() if p.grad is not None]
    # The largest magnitude is finite exactly if all are, and no sum can overflow on the way.
    largest = [torch.linalg.vector_norm(g, torch.inf) for g in gradients if g.numel()]
    return not all(bool(norm.isfinite()) for norm in _together(largest))


class StepGate:
    """Holds the batches of an optimizer step back until it is known whether an overflow spoils it.

    Under gradient accumulation an overflow in a later batch makes the scaler skip the step of all of them.
    """

    def __init__(self, deliver: Callable[[ProjectedBatch], None]) -> None:
        self._deliver = deliver
        self._held: list[ProjectedBatch] = []

    def put(self, batch: ProjectedBatch) -> None:
        """Take a batch, which goes on at once unless its step may still be skipped."""
        if self._held and self._held[0].step != batch.step:
            self.release()
        self._held.append(batch)
        if batch.overflow:
            self._held = [replace(held, overflow=True) for held in self._held]
        if batch.overflow is not False:
            self.release()

    def release(self) -> None:
        """Let everything go on that is held."""
        held, self._held = self._held, []
        for batch in held:
            self._deliver(batch)


def _local(gradient: Tensor) -> Tensor:
    """This process's part of a gradient that is spread over several."""
    shard = getattr(gradient, "to_local", None)
    dense = gradient if shard is None else shard()
    return dense.coalesce().values() if dense.is_sparse else dense


def _together(norms: list[Tensor]) -> Tensor:
    return torch.stack([norm.float() for norm in norms]).cpu() if norms else torch.zeros(0)
