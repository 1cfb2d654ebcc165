"""From calls of tracked modules to the two factors of every sample's gradient, projected or not."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logix_like.capture.projector import Projector
from logix_like.capture.selection import TrackedModule, Use

OnFactors = Callable[[str, Tensor, Tensor, bool], None]
"""Told of a call's part in a block, once its gradient is there.

Arguments: the block, ``inputs [batch, positions, rank_in]``, ``outputs [batch, positions, rank_out]`` (the block's
per-sample gradient grows by ``outputs^T inputs``), and whether the inputs were announced when they were read.
"""

OnInput = Callable[[str, Tensor], None]
"""Told once, when it is read, of an input that the modules of a group share: group and ``[batch, positions, rank]``."""


@dataclass(slots=True)
class _SharedInput:
    """The last tensor that a group of modules read, with its projection."""

    tensor: weakref.ref[Tensor]
    version: int
    kept: Tensor

    def holds(self, value: Tensor) -> bool:
        return self.tensor() is value and self.version == value._version


class FactorReader:
    """Reads one batch's calls, each shared input once, and hands their factors on.

    It decides, at a block's first call ever, which group's input projection the block uses.
    """

    def __init__(self, projector: Projector, on_factors: OnFactors, on_input: OnInput | None = None) -> None:
        self._projector = projector
        self._on_factors = on_factors
        self._on_input = on_input
        self._shared: dict[tuple[str, bool], _SharedInput] = {}

    def read_input(self, tracked: TrackedModule, value: Tensor) -> list[Tensor]:
        """Project a call's input for every use of the module; what is returned waits for the gradient."""
        return [self._read(tracked, use, value) for use in tracked.uses]

    def read_gradient(self, tracked: TrackedModule, kept: object, gradient: Tensor) -> None:
        """Hand on the factors of the call's part in each block."""
        assert isinstance(kept, list)
        gradient = _plain(gradient)
        for use, held in zip(tracked.uses, kept, strict=True):
            sides = self._projector.sides(use, gradient.dtype, gradient.device)
            inward, outward = tracked.rule.read_gradient(tracked.module, held, gradient, *sides)
            if use.transposed:
                inward, outward = outward, inward
            self._on_factors(use.block, inward, outward, tracked.rule.shares_input and not use.transposed)

    def _read(self, tracked: TrackedModule, use: Use, value: Tensor) -> Tensor:
        if use.transposed or not tracked.rule.shares_input:
            return self._read_alone(tracked, use, _plain(value))
        group = self._projector.group(use.block)
        if group is None:
            group = self._join(use, value)
        shared = self._shared.get((group, use.bias))
        if shared is not None and shared.holds(value):
            return shared.kept
        plain = _plain(value)
        side = self._projector.sides(use, plain.dtype, plain.device)[0]
        kept = tracked.rule.read_input(tracked.module, plain, side)
        self._shared[group, use.bias] = _SharedInput(weakref.ref(value), value._version, kept)
        if self._on_input is not None:
            self._on_input(group, kept)
        return kept

    def _read_alone(self, tracked: TrackedModule, use: Use, plain: Tensor) -> Tensor:
        if self._projector.group(use.block) is None:
            self._projector.assign(use.block, use.block)
        dtype = plain.dtype if plain.is_floating_point() else _weight_dtype(tracked)
        side = self._projector.sides(use, dtype, plain.device)[0]
        return tracked.rule.read_input(tracked.module, plain, side)

    def _join(self, use: Use, value: Tensor) -> str:
        """Decide the block's group, at its first call ever: that of a block that has just read the same tensor."""
        fits = (
            name
            for (name, bias), shared in self._shared.items()
            if bias == use.bias and shared.holds(value) and self._projector.may_share(use.block, name)
        )
        group = next(fits, use.block)
        self._projector.assign(use.block, group)
        return group


def _weight_dtype(tracked: TrackedModule) -> torch.dtype:
    dtype = tracked.module.weight.dtype
    assert isinstance(dtype, torch.dtype)
    return torch.float32 if dtype == torch.float16 else dtype


def _plain(value: Tensor) -> Tensor:
    """Outside autograd, and wide enough: float16 would overflow in products."""
    if value.requires_grad:
        value = value.detach()
    return value.float() if value.dtype == torch.float16 else value
