"""One block of a training loop: what the user said of it, and what its gradients must be multiplied by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from logix_like.capture.tracker import Recording
from logix_like.curvature.stream import Look
from logix_like.errors import CaptureError, ConfigError
from logix_like.ids import as_data_ids
from logix_like.layout import DataId
from logix_like.timing import Stopwatch

Reduction = Literal["mean", "sum", "token_mean"]
Scale = TypeVar("Scale", float, float | Tensor)

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class BlockOptions:
    """What a block is told."""

    data_id: tuple[DataId, ...]
    mask: Tensor | None = None
    """``[batch, positions]``, true where a position counts."""
    scale: float = 1.0
    """What the loop multiplied its loss by, e.g. 1 / (number of accumulated batches)."""
    divisor: float | None = None
    """What the loss, a sum over the samples, was divided by, where it is not what ``reduction`` implies."""
    scaler: Any = None
    """The ``torch.amp.GradScaler`` that scales the loss, if there is one."""
    reduction: Reduction = "mean"
    per_token: bool = False
    loss: Tensor | None = None
    """``[batch]`` per-sample losses, to be stored beside the rows."""
    metadata: Mapping[str, tuple[str | int | float, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        data_id: Any,
        *,
        mask: Tensor | None = None,
        loss: Tensor | None = None,
        metadata: Mapping[str, Sequence[Any]] | None = None,
        scale: float = 1.0,
        **others: Any,
    ) -> BlockOptions:
        """Check what a user gave; lengths that differ from the number of ids are refused."""
        if others.get("reduction", "mean") not in get_args(Reduction):
            known = ", ".join(get_args(Reduction))
            raise ConfigError(f"loss_reduction is {others['reduction']!r}; known are {known}")
        mask = None if mask is None else torch.as_tensor(mask)
        ids = as_data_ids(data_id, mask)
        if not ids:
            raise CaptureError("data_id is empty; give one id for each sample of the batch")
        _require_positive(scale)
        if not hasattr(others.get("scaler") or torch.amp.GradScaler, "get_scale"):
            raise CaptureError(f"scaler is {others['scaler']!r}; give the torch.amp.GradScaler that scales the loss")
        if mask is not None and (mask.ndim != 2 or len(mask) != len(ids)):
            raise CaptureError(f"mask has shape {tuple(mask.shape)}; expected [{len(ids)}, positions]")
        if loss is not None:
            loss = torch.as_tensor(loss).detach()
            if loss.shape != (len(ids),):
                raise CaptureError(f"loss has shape {tuple(loss.shape)}; expected one loss for each of {len(ids)} ids")
        if not isinstance(metadata or {}, Mapping):
            raise CaptureError(f"metadata is a {type(metadata).__name__}; give {{column: one value for each sample}}")
        columns = {name: _column(name, values) for name, values in (metadata or {}).items()}
        for name, values in columns.items():
            if len(values) != len(ids):
                raise CaptureError(f"metadata {name!r} has {len(values)} values for {len(ids)} ids")
        return cls(ids, mask=mask, loss=loss, metadata=columns, scale=scale, **others)

    def loss_scale(self, device: torch.device = _HOST) -> float | Tensor:
        """What the loss of a block that begins now is multiplied by, the scaler's part included."""
        if self.scaler is None:
            return self.scale
        if device.type == "cpu":
            return self.scale * float(self.scaler.get_scale())
        # Its number is asked for on the device: get_scale would wait for all that is being computed there.
        scaled: Tensor = self.scaler.scale(torch.ones((), device=device))
        return self.scale * scaled

    def factor(self, loss_scale: Scale) -> Scale:
        """What captured gradients are multiplied by to be those of each sample's own loss."""
        return self._batch_factor() / loss_scale

    def of_one(self, number: int) -> float:
        """What the loss of sample ``number`` alone, reduced as the block's, is multiplied by to be its own loss."""
        if self.reduction != "token_mean":
            return 1.0
        return float(self._required_mask("loss_reduction: token_mean")[number].sum())

    def row_divisors(self) -> Tensor | None:
        """``[batch, 1]`` token counts that rows are divided by, if they are to be."""
        if not self.per_token:
            return None
        return self._required_mask("per_token").sum(1, keepdim=True).clamp_min(1)

    def _batch_factor(self) -> float:
        if self.divisor is not None:
            return self.divisor
        if self.reduction == "mean":
            return float(len(self.data_id))
        if self.reduction == "sum":
            return 1.0
        return self._tokens

    @cached_property
    def _tokens(self) -> float:
        tokens = float(self._required_mask("loss_reduction: token_mean").sum())
        if not tokens > 0:
            raise CaptureError("mask leaves out every token of the block, whose mean loss is then that of nothing")
        return tokens

    def _required_mask(self, asker: str) -> Tensor:
        if self.mask is None:
            raise CaptureError(
                f"{asker} needs mask=[batch, positions], true for the tokens that the loss counts (labels != -100)"
            )
        return self.mask


class Block:
    """A context manager around one forward and backward pass.

    Whatever goes wrong inside, the hooks are gone afterwards; an exception drops this block's rows only.
    """

    def __init__(
        self,
        recording: Recording | None,
        look: Look | None,
        options: BlockOptions,
        on_begin: Callable[[Block], None],
        on_end: Callable[[Block], None],
        on_drop: Callable[[Block], None],
        watch: Stopwatch,
    ) -> None:
        self.recording = recording
        """None when this block is one of those that are not logged."""
        self.look = look
        """Beside the recording, for the curvature at full size; None when this block is not looked at."""
        self.options = options
        self._on_begin = on_begin
        self._on_end = on_end
        self._on_drop = on_drop
        self._watch = watch
        self._begun = self._ended = False

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass has reached a tracked module, while this block is open and logged."""
        return self.recording is not None and self.recording.has_gradients

    def measured(self, scale: float, divisor: float) -> None:
        """Say before the end what the loss was, where it is known only after the backward pass.

        The loss was ``scale`` times the sum of the samples' losses divided by ``divisor``; this takes the place of
        the ``scale`` and ``loss_reduction`` that the block was opened with.

        Raises:
            CaptureError: ``scale`` is not positive.
        """
        _require_positive(scale)
        self.options = replace(self.options, scale=scale, divisor=divisor)
        self.measure()

    def drop(self) -> None:
        """Close the block without rows."""
        self._ended = True
        for follower in (self.look, self.recording):
            if follower is not None:
                follower.__exit__(None, None, None)
        self._on_drop(self)

    def __enter__(self) -> Block:
        if self._begun:
            raise CaptureError("this block was entered before; call run(data_id=...) again for each batch")
        with self._watch:
            self.measure()
            self._on_begin(self)
            try:
                self._begun = True
                for follower in (self.recording, self.look):
                    if follower is not None:
                        follower.__enter__()
            except BaseException:  # Ctrl-C, too: the with statement that it keeps from beginning would not end it
                self.drop()
                raise
        return self

    def measure(self) -> None:
        """Note what the loss is multiplied by now; a block does so as it begins.

        A scaler that is updated inside it has moved on at the end, and a mask on a device is counted before there is
        anything to wait for.
        """
        if self.recording is not None:
            self.recording.factor = self.options.factor(self.options.loss_scale(self.recording.device))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._ended:  # by run.end() or run.abort(), inside the with statement
            return
        try:
            with self._watch:
                self.drop()
                if exc_type is None:
                    if self.recording is not None:
                        self.recording.check()
                    self._on_end(self)
        except BaseException:
            self.drop()  # again: Ctrl-C may have broken off the first
            raise


def _require_positive(scale: Any) -> None:
    if isinstance(scale, str) or scale is None or not 0 < float(scale) < math.inf:
        raise CaptureError(f"scale is {scale}; give the positive factor that the loss was multiplied by")


def _column(name: str, values: Any) -> tuple[str | int | float, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise CaptureError(f"metadata {name!r} is {values!r}; give a sequence with one value for each sample")
    return tuple(_plain(value) for value in values)


def _plain(value: Any) -> str | int | float:
    if getattr(value, "size", None) == 1 or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    if not isinstance(value, str | int | float):
        raise CaptureError(f"a metadata value is {value!r} ({type(value).__name__}); give str, int or float")
    return value
