"""One block of training code: from module calls to projected per-sample gradients."""

from __future__ import annotations

import operator
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from logix_like.capture.batch import FactorMoments
from logix_like.capture.selection import TrackedModule
from logix_like.errors import CaptureError
from logix_like.layout import Layout

WAITING = 8 * 2**20
"""Bytes of projected factors that may wait to be multiplied."""


class CallReader:
    """Checks a module's call and hands its input, then its output's gradient, to two receivers.

    It knows nothing of projections: :class:`BlockRecorder` projects, a warm-up keeps.
    """

    def __init__(
        self,
        batch: int,
        on_input: Callable[[TrackedModule, Tensor], object],
        on_gradient: Callable[[TrackedModule, object, Tensor], None],
        *,
        detached: bool = False,
        device_type: str = "cpu",
    ) -> None:
        self._batch = batch
        self._device_type = device_type
        self._on_input = on_input
        self._on_gradient = on_gradient
        self._detached = detached
        self._open = True
        self.gradients = 0
        """How many gradients have arrived."""
        self.called: set[str] = set()
        """Names of the modules that were called."""
        self._mismatched = ""

    def close(self) -> None:
        """Ignore what arrives from now on (a later backward through the same graph)."""
        self._open = False

    def __call__(self, tracked: TrackedModule, value: Tensor, output: Tensor) -> Tensor | None:
        self.called.add(tracked.name)
        if not self._open or not torch.is_grad_enabled():
            return None
        replaced = None
        if not output.requires_grad:
            if not self._detached:
                return None
            # With frozen weights the graph starts here; a copy, so that in-place layers may follow.
            output = replaced = output.detach().requires_grad_().clone()
        if tracked.batch_dim:
            value = value.transpose(0, tracked.batch_dim)
        if not value.ndim or value.size(0) != self._batch:
            # A call that no gradient comes back to is no part of any row (a DoRA adapter reads its own weights so).
            self._mismatched = self._mismatched or self._mismatch(tracked, value, "input")
            output.register_hook(self._refuse)
            return replaced
        if torch.is_autocast_enabled(self._device_type):
            with torch.autocast(self._device_type, enabled=False):
                kept = self._on_input(tracked, value)
        else:
            kept = self._on_input(tracked, value)
        output.register_hook(partial(self._gradient, tracked, kept))
        return replaced

    def _gradient(self, tracked: TrackedModule, kept: object, gradient: Tensor) -> None:
        if not self._open:
            return
        if gradient.requires_grad:
            raise CaptureError(
                f"module {tracked.name!r}: a backward pass with create_graph=True (a gradient penalty, a higher-order "
                "method) went through it inside a block; its second-order part has no per-sample rows: do that pass "
                "outside the block, or exclude the module"
            )
        self.gradients += 1
        if tracked.batch_dim:
            gradient = gradient.transpose(0, tracked.batch_dim)
        if not gradient.ndim or gradient.size(0) != self._batch:
            raise CaptureError(self._mismatch(tracked, gradient, "output"))
        # Autocast is for the model's products, not for ours.
        if torch.is_autocast_enabled(self._device_type):
            with torch.autocast(self._device_type, enabled=False):
                self._on_gradient(tracked, kept, gradient)
        else:
            self._on_gradient(tracked, kept, gradient)

    def _refuse(self, gradient: Tensor) -> None:
        if self._open:
            raise CaptureError(self._mismatched)

    def _mismatch(self, tracked: TrackedModule, value: Tensor, what: str) -> str:
        samples = value.shape[0] if value.ndim else 0
        shared = "; what all samples share (a learned prompt) has one gradient for all of them" if samples == 1 else ""
        return (
            f"module {tracked.name!r}: its {what} has shape {tuple(value.shape)}, so {samples} samples along "
            f"dimension {tracked.batch_dim}, but {self._batch} data ids were given; give one id for each sample, "
            f"name another dimension in modules.batch_dim, or exclude a module that mixes samples{shared}"
        )


class _Part(NamedTuple):
    """Factors of one call, or an input that several calls share."""

    name: str
    """Of the block, or of the group that shares the input."""
    inward: Tensor
    outward: Tensor | None
    """None for a shared input, which adds to the moments alone."""
    counted: bool
    """Whether the input adds to the moments; it does so when it is read where it is shared."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Parts of one kind are multiplied in one operation."""
        inward, outward = self.inward, self.outward
        outer = None if outward is None else (outward.shape, outward.dtype)
        return inward.device, inward.shape, inward.dtype, outer, self.counted


class BlockRecorder:
    """Sums what the tracked modules' calls contribute to the rows of one batch.

    Projected factors wait for others of their kind, since products of so small ones cost more in calls than in
    arithmetic. A backward pass may add from several threads, one for each device.
    """

    def __init__(
        self,
        layout: Layout,
        batch: int,
        *,
        mask: Tensor | None = None,
        moments: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self._mask = mask
        self._masked = 0 if mask is None else int(mask.sum())
        self._moments = moments
        self._batch = batch
        self._layout = layout
        self._dtype = dtype
        self._device = device
        self._live = {block.name for block in layout if any(map(operator.ge, block.rank, block.shape))}
        self._lock = threading.Lock()
        self._waiting: list[_Part] = []
        self._bytes = 0
        self._blocks: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._positions: dict[str, int] = {}

    def add_factors(self, block: str, inward: Tensor, outward: Tensor, shared: bool) -> None:
        """Add a call's part of every sample's gradient to its block; ``shared`` inputs were announced before."""
        part = _Part(block, inward, outward, not shared)
        if block not in self._live:
            self._wait(part, inward.nbytes + outward.nbytes)
            return
        # What is not projected may be the gradient itself, which may be changed in place when this has returned.
        with self._lock:
            self._multiply([part])

    def add_shared_input(self, group: str, kept: Tensor) -> None:
        """Count an input that several modules share in the moments."""
        if self._moments:
            self._wait(_Part(group, kept, None, True), kept.nbytes)

    def rows(self) -> Tensor:
        """``[batch, width]``: the blocks side by side; zero for a module that got no gradient."""
        self._multiply_waiting()
        rows = []
        for block in self._layout:
            found = self._blocks.get(block.name)
            if found is None:
                rows.append(torch.zeros(self._batch, block.size, dtype=self._dtype, device=self._device))
            else:
                rows.append(self._layout.pick(block.name, found).to(self._device))
        return torch.cat(rows, 1)

    def moments(self, factor: float | Tensor) -> FactorMoments | None:
        """The Kronecker moments of the batch, gradients multiplied by ``factor``."""
        if not self._moments:
            return None
        self._multiply_waiting()
        outputs = {name: moment * factor**2 for name, moment in self._outputs.items()}
        return FactorMoments(self._inputs, outputs, self._positions, self._batch)

    def _wait(self, part: _Part, size: int) -> None:
        with self._lock:
            self._waiting.append(part)
            self._bytes += size
            if self._bytes > WAITING:
                self._multiply_waiting(part.inward.device)

    def _multiply_waiting(self, device: torch.device | None = None) -> None:
        """Multiply what waits; within a backward pass only what this thread's ``device`` has computed."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        alike: defaultdict[tuple[object, ...], list[_Part]] = defaultdict(list)
        for part in waiting:
            if device is None or part.inward.device == device:
                alike[part.kind].append(part)
            else:
                self._waiting.append(part)
        for parts in alike.values():
            self._multiply(parts)

    def _multiply(self, parts: list[_Part]) -> None:
        names = [part.name for part in parts]
        inward = self._stacked([part.inward for part in parts])
        outward = [part.outward for part in parts if part.outward is not None]
        if outward:
            stacked = self._stacked(outward)
            _add(self._blocks, names, stacked.mT @ inward)
            if self._moments:
                _add(self._outputs, names, self._squares(stacked))
        if self._moments and parts[0].counted:
            _add(self._inputs, names, self._squares(inward))
            positions = self._masked if self._masks(inward) else inward.shape[1] * inward.shape[2]
            for name in names:
                self._positions[name] = self._positions.get(name, 0) + positions

    def _stacked(self, factors: list[Tensor]) -> Tensor:
        """``[calls, batch, positions, rank]``."""
        together = torch.stack(factors) if len(factors) > 1 else factors[0].unsqueeze(0)
        return together.to(self._dtype)

    def _masks(self, factors: Tensor) -> bool:
        return self._mask is not None and self._mask.shape == factors.shape[1:3]

    def _squares(self, factors: Tensor) -> Tensor:
        """``[calls, rank, rank]``: second moments summed over the positions that the mask leaves in."""
        if self._mask is not None and self._masks(factors):
            factors = factors * self._mask.to(factors).unsqueeze(-1)
        vectors = factors.flatten(1, 2)
        return vectors.mT @ vectors


def _add(sums: dict[str, Tensor], names: list[str], values: Tensor) -> None:
    for name, value in zip(names, values.unbind(), strict=True):
        known = sums.get(name)
        sums[name] = value if known is None else known + value
