"""Steps that a ``GradScaler`` skips: their rows are flagged, since no such step was ever taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from logix_like.capture.batch import ProjectedBatch


def overflowed(model: nn.Module, scaler: Any) -> Tensor | None:
    """Whether a gradient that ``model`` holds is not finite, so that the scaler will skip the step.

    A bool ``[]`` where the gradients are, so that nobody waits for it yet; None without a scaler (or with a disabled
    one), where nothing is ever skipped. Where gradients are spread over processes (FSDP), all call this together.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # The largest magnitude is finite exactly if all are, and no sum can overflow on the way.
    largest = [torch.linalg.vector_norm(g, torch.inf) for g in map(_local, gradients) if g.numel()]
    found = ~_together(largest).isfinite().all()
    meshes = dict.fromkeys(g.device_mesh for g in gradients if hasattr(g, "device_mesh"))
    return _anywhere(found, list(meshes)) if meshes else found


def _anywhere(found: Tensor, meshes: list[Any]) -> Tensor:
    """Whether any of the processes has ``found`` it in its part."""
    count = found.to(meshes[0].device_type, torch.int32)
    for mesh in meshes:
        for dimension in range(mesh.ndim):
            dist.all_reduce(count, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
    return count > 0


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


def _local(gradient: Any) -> Tensor:
    """This process's part of a gradient that is spread over several."""
    dense: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return dense.coalesce().values() if dense.is_sparse else dense


def _together(norms: list[Tensor]) -> Tensor:
    if not norms:
        return torch.zeros(0)
    return torch.stack([norm.float().to(norms[0].device, non_blocking=True) for norm in norms])
