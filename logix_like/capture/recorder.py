"""One block of training code: from module calls to projected per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from logix_like.capture.batch import FactorMoments
from logix_like.capture.selection import TrackedModule
from logix_like.errors import CaptureError
from logix_like.layout import Layout


@dataclass
class _Moments:
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)


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
        if tracked.batch_dim or not value.ndim or value.size(0) != self._batch:
            value = self._checked(tracked, value, "input")
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
        if tracked.batch_dim or not gradient.ndim or gradient.size(0) != self._batch:
            gradient = self._checked(tracked, gradient, "output")
        # Autocast is for the model's products, not for ours.
        if torch.is_autocast_enabled(self._device_type):
            with torch.autocast(self._device_type, enabled=False):
                self._on_gradient(tracked, kept, gradient)
        else:
            self._on_gradient(tracked, kept, gradient)

    def _checked(self, tracked: TrackedModule, value: Tensor, what: str) -> Tensor:
        if tracked.batch_dim:
            value = value.transpose(0, tracked.batch_dim)
        samples = value.shape[0] if value.ndim else 0
        if samples != self._batch:
            raise CaptureError(
                f"module {tracked.name!r}: its {what} has shape {tuple(value.shape)}, so {samples} samples along "
                f"dimension {tracked.batch_dim}, but {self._batch} data ids were given; give one id for each sample, "
                "name another dimension in modules.batch_dim, or exclude a module that mixes samples"
            )
        return value


class BlockRecorder:
    """Sums what the tracked modules' calls contribute to the rows of one batch."""

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
        self._moments = _Moments() if moments else None
        self._masked = 0 if mask is None else int(mask.sum())
        self._batch = batch
        self._layout = layout
        self._dtype = dtype
        self._device = device
        self._blocks: dict[str, Tensor] = {}

    def add_factors(self, block: str, inward: Tensor, outward: Tensor, shared: bool) -> None:
        """Add a call's part of every sample's gradient to its block; ``shared`` inputs were announced before."""
        if inward.dtype != self._dtype or outward.dtype != self._dtype:
            inward, outward = inward.to(self._dtype), outward.to(self._dtype)
        _add(self._blocks, block, torch.bmm(outward.mT, inward))
        if self._moments is not None:
            _add(self._moments.outputs, block, _outer_sum(self._counted(outward)))
            # A shared input was counted when it was read, once for all who read it.
            if not shared:
                self._add_input_moment(block, inward)

    def add_shared_input(self, group: str, kept: Tensor) -> None:
        """Count an input that several modules share in the moments."""
        if self._moments is not None:
            self._add_input_moment(group, kept.to(self._dtype))

    def rows(self) -> Tensor:
        """``[batch, width]``: the blocks side by side; zero for a module that got no gradient."""
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
        if self._moments is None:
            return None
        outputs = {name: moment * factor**2 for name, moment in self._moments.outputs.items()}
        return FactorMoments(self._moments.inputs, outputs, self._moments.positions, self._batch)

    def _add_input_moment(self, group: str, inward: Tensor) -> None:
        assert self._moments is not None
        masked = self._masks(inward)
        _add(self._moments.inputs, group, _outer_sum(self._counted(inward)))
        positions = self._masked if masked else inward.shape[0] * inward.shape[1]
        self._moments.positions[group] = self._moments.positions.get(group, 0) + positions

    def _masks(self, factor: Tensor) -> bool:
        return self._mask is not None and self._mask.shape == factor.shape[:2]

    def _counted(self, factor: Tensor) -> Tensor:
        """``factor [batch, positions, rank]`` with zeros at the positions that the mask leaves out."""
        if self._mask is None or not self._masks(factor):
            return factor
        return factor * self._mask.to(factor).unsqueeze(-1)


def _outer_sum(factor: Tensor) -> Tensor:
    flat = factor.reshape(-1, factor.shape[-1])
    return flat.T @ flat


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    known = sums.get(name)
    sums[name] = value if known is None else known + value
