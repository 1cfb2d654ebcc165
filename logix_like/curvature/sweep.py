"""Runs batches through a model and hands the factors of every tracked call on; nothing of the model changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from logix_like.capture.factors import FactorReader
from logix_like.capture.hooks import HookSet
from logix_like.capture.projector import Projector
from logix_like.capture.recorder import CallReader
from logix_like.capture.selection import Selection
from logix_like.errors import CaptureError
from logix_like.layout import Layout
from logix_like.objective import Batch, Model, Objective, require_objective
from logix_like.projection import INITS
from logix_like.weights import frozen

Losses = Callable[[Model, Batch], Tensor]
"""``losses(model, batch) -> [batch]``: what is differentiated, sample by sample."""

Blocks = Mapping[str, Tensor]
"""By block: ``[n, d_out, d_in]``, n gradients (or vectors like them) of full size."""

FACTOR_DTYPES = (torch.float32, torch.float64)


class Sink(ABC):
    """What takes the factors of one batch after another.

    A sample's gradient of a block is ``sum over calls of outputs^T inputs``.
    """

    def begin(self, samples: int, mask: Tensor | None) -> None:  # noqa: B027
        """A batch of ``samples`` begins; ``mask [samples, positions]`` says which positions count, None all."""

    def add_input(self, group: str, inputs: Tensor) -> None:  # noqa: B027 (most have no need of it)
        """``inputs [samples, positions, d_in]`` that all modules of a group read; told once."""

    @abstractmethod
    def add_factors(self, block: str, inputs: Tensor, outputs: Tensor, shared: bool) -> None:
        """One call: ``[samples, positions, d_in]`` and the losses' gradient ``[samples, positions, d_out]``.

        ``shared`` inputs were told to :meth:`add_input` before.
        """

    def end(self) -> None:  # noqa: B027
        """The batch has ended."""


class Sweep:
    """A model with what it is trained for and which of its modules are tracked.

    Args:
        model: Is run in eval mode with frozen weights, so that no weight gradient is computed.
        objective: What the model is trained for.
        selection: Its tracked modules.
        mask: ``mask(batch) -> [batch, positions]``; without it, the ``attention_mask`` of a batch that has one.
        projector: Makes factors small; without it they have full size.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        selection: Selection,
        *,
        mask: Callable[[Batch], Tensor | None] | None = None,
        projector: Projector | None = None,
    ) -> None:
        require_objective(objective)
        self.model = model
        self.objective = objective
        self.selection = selection
        self._mask = mask or _attention_mask
        self._projector = projector or Projector(selection.blocks, INITS["identity"], rank=1, seed=0)

    @property
    def layout(self) -> Layout:
        """The blocks at full size; which modules share an input is known once a batch has run."""
        return self._projector.layout()

    @property
    def groups(self) -> dict[str, str]:
        """By block, whose input it shares."""
        return {block.name: block.input_group for block in self.layout}

    @groups.setter
    def groups(self, groups: Mapping[str, str]) -> None:
        for block, group in groups.items():
            self._projector.assign(block, group)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.selection.modules[0].module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In which factors are multiplied."""
        return widened(torch.empty(0, dtype=next(self.selection.modules[0].module.parameters()).dtype)).dtype

    def samples(self, batch: Batch) -> int:
        """How many samples ``batch`` has."""
        return len(self.objective.labels(batch))

    def mask(self, batch: Batch) -> Tensor | None:
        """``[samples, positions]``: which positions of ``batch`` count; None if all do.

        Raises:
            CaptureError: it is something else.
        """
        mask: object = self._mask(batch)
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == self.samples(batch)):
            return mask
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise CaptureError(
            f"the mask has the {found}; expected a tensor [samples, positions] for the batch's {self.samples(batch)} "
            "samples"
        )

    def run(self, batch: Batch, losses: Losses, sink: Sink) -> Tensor:
        """One forward and backward pass of the summed ``losses``, which are returned ``[samples]``.

        Raises:
            CaptureError: no gradient reached a tracked module.
        """
        batch = on_device(batch, self.device)
        samples = self.samples(batch)
        if not samples:
            raise CaptureError("a batch holds no sample: leave empty batches out of the loader")
        reader = FactorReader(self._projector, sink.add_factors, sink.add_input)
        calls = CallReader(
            samples, reader.read_input, reader.read_gradient, detached=True, device_type=self.device.type
        )
        sink.begin(samples, self.mask(batch))
        with frozen(self.model), torch.enable_grad(), HookSet(self.selection, calls, samples):
            values = losses(self.model, batch)
            require_losses(values, samples)
            if not values.requires_grad:
                raise CaptureError("no tracked module was called: run the forward pass of the tracked model itself")
            values.sum().backward()
        calls.close()
        if not calls.gradients:
            raise CaptureError("no gradient reached any tracked module: the losses do not depend on their outputs")
        with torch.autocast(self.device.type, enabled=False):
            sink.end()
        return values.detach()


def require_losses(values: Tensor, samples: int) -> None:
    """Raise :class:`CaptureError` unless ``values`` are one loss for each of so many samples."""
    if values.shape != (samples,):
        raise CaptureError(
            f"the losses have the shape {tuple(values.shape)}; expected one for each of the batch's {samples} "
            "samples: do not reduce over the batch"
        )


def on_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with its tensors on ``device``.

    Mappings, tuples (named ones too) and lists are looked into; whatever else can be moved (``.to(device)``, as
    transformers' batches) moves itself.
    """
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: on_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [on_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def widened(factor: Tensor) -> Tensor:
    """``factor`` in float32, or as it is where it is wider."""
    return factor if factor.dtype in FACTOR_DTYPES else factor.float()


def _attention_mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None  # others say who sees whom
