"""Steps that a ``GradScaler`` skips: their rows are flagged, since no such step was ever taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from logix_like.capture.batch import ProjectedBatch
from logix_like.ranks import Ranks


def overflowed(model: nn.Module, scaler: Any) -> Tensor | None:
    """Whether a gradient that ``model`` holds is not finite, so that the scaler will skip the step.

    A bool ``[]`` where the gradients are, so that nobody waits for it yet; None without a scaler (or with a disabled
    one), where nothing is ever skipped.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # The largest magnitude is finite exactly if all are, and no sum can overflow on the way.
    largest = [torch.linalg.vector_norm(own, torch.inf) for own in map(_local, gradients) if own.numel()]
    spoiled = ~_together(largest).isfinite().all()
    # Each process sees its own part only, and the scaler skips the step in all of them.
    return Ranks.here().any(spoiled) if any(_is_shared(g) for g in gradients) else spoiled


class StepGate:
    """Holds the batches of an optimizer step back until it is known whether an overflow spoils it.

    Under gradient accumulation an overflow in a later batch makes the scaler skip the step of all of them.
    """

    def __init__(self, deliver: Callable[[ProjectedBatch], None]) -> None:
        self._deliver = deliver
        self._held: list[tuple[ProjectedBatch, Tensor]] = []

    @property
    def holds(self) -> bool:
        """Whether batches are held back."""
        return bool(self._held)

    def put(self, batch: ProjectedBatch, overflow: Tensor | None) -> None:
        """Take a batch with its flag, which arrives with it; it goes on at once if its step cannot be skipped."""
        self.settle(batch.step)
        if overflow is None:
            self._deliver(batch)
        else:
            self._held.append((batch, overflow))

    def settle(self, step: int) -> None:
        """Let go on what is held if the fate of its step is known, when ``step`` is the one that comes next."""
        if self._held and (self._held[0][0].step != step or self._spoiled()):
            self.release()

    def release(self) -> None:
        """Let everything go on that is held."""
        spoiled = self._spoiled()
        held, self._held = self._held, []
        for batch, _ in held:
            self._deliver(replace(batch, overflow=spoiled))

    def _spoiled(self) -> bool:
        for batch, _ in self._held:
            batch.wait()
        return any(bool(flag) for _, flag in self._held)


def _is_shared(gradient: Tensor) -> bool:
    """Whether a gradient is spread over several processes."""
    return hasattr(gradient, "to_local")


def _local(gradient: Any) -> Tensor:
    """This process's part of a gradient that is spread over several."""
    dense: Tensor = gradient.to_local() if _is_shared(gradient) else gradient
    return dense.coalesce().values() if dense.is_sparse else dense


def _together(norms: list[Tensor]) -> Tensor:
    if not norms:
        return torch.zeros(0)
    return torch.stack([norm.float().to(norms[0].device, non_blocking=True) for norm in norms])
