"""A block around a forward and backward pass whose loss is the trainer's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from logix_like.errors import CaptureError
from logix_like.run.block import Block

from .logits import cross_entropy_factor, token_factor


class OpenBatch:
    """A block from the model's forward pass to the end of the backward pass."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self._divisor = 0.0
        self._scale: Tensor | None = None
        block.__enter__()

    def returned(self, loss: Tensor, divisor: float) -> None:
        """The forward pass is over; what the Trainer does to the loss will show in the loss's gradient."""
        self._divisor = divisor
        loss.register_hook(self._seen)

    def gave(self, logits: Tensor, smoothing: float) -> None:
        """The model returned no loss: it got no labels, since the Trainer computes the loss from the logits itself."""
        logits.register_hook(partial(self._seen_by_logits, logits.detach(), smoothing))

    def gave_log_chances(self, log_chances: Tensor) -> None:
        """The log-probabilities of the labels, from which trl's trainers compute the loss."""
        log_chances.register_hook(partial(self._seen_by_log_chances, log_chances.detach()))

    def end(self) -> None:
        """Close the block.

        Raises:
            CaptureError: no gradient reached the loss that the model returned.
        """
        if self._scale is None:
            self.block.drop()
            raise CaptureError(
                "the loss that was trained on is not the one that the model returned (a compute_loss of one's own), so "
                "rows could not be scaled; have the model return its loss, or log in a loop of your own"
            )
        with self._dropped_on_error():
            scaler = self.block.options.scaler
            scaled = 1.0 if scaler is None else scaler.get_scale()  # which the loss's gradient has seen, too
            self.block.measured(float(self._scale) / scaled, self._divisor)
        self.block.__exit__(None, None, None)

    def _seen(self, gradient: Tensor) -> None:
        self._scale = gradient.detach()

    def _seen_by_logits(self, logits: Tensor, smoothing: float, gradient: Tensor) -> None:
        with self._dropped_on_error():
            if self.block.options.per_token and logits.ndim > 2:
                raise CaptureError(
                    "per_token: true divides a row by the sample's counted tokens, which the labels tell; with a loss "
                    "outside the model (compute_loss_func, label smoothing) these do not reach it: set per_token: false"
                )
            self._scale = torch.tensor(cross_entropy_factor(logits, gradient, smoothing), dtype=torch.float64)
            self._divisor = 1.0

    def _seen_by_log_chances(self, log_chances: Tensor, gradient: Tensor) -> None:
        with self._dropped_on_error():
            self._scale = torch.tensor(token_factor(log_chances, gradient), dtype=torch.float64)
            self._divisor = 1.0

    @contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        """An error of ours ends the training: its block must not stay open on the model."""
        try:
            yield
        except BaseException:
            self.block.drop()
            raise
