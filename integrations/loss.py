"""What a Hugging Face model's own loss is: a sum over which samples or tokens, divided by what."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logix_like.errors import CaptureError

IGNORED = -100
"""The label of what a loss leaves out."""
CLOSE = 2e-4
"""Relative difference between divisors that counts as none: the loss is computed in float32, in another order."""
ROUGH = 2e-2
"""The same where it is rounded to 16 bits."""


class LossReader:
    """Finds the divisor of a model's loss: its own batch's count, or the count of a whole accumulated step.

    A trainer that accumulates gives ``num_items_in_batch``, the count over all micro-batches, to each of them; some
    models divide by it and some do not. Where it makes a difference, the loss is computed once more from the logits
    to see which it is; that is remembered. It is computed at the first batch anyway: a loss that is not the mean
    cross-entropy of its labels is warned of.

    With ``guess`` a model of no known kind whose loss fits only labels that are shifted is taken for a causal one.
    """

    def __init__(self, model: nn.Module, *, guess: bool = True) -> None:
        self._shifts = shifts_labels(model)
        self._guess = guess and not self._shifts
        self._divides_by_step: bool | None = None
        self._checked = False

    def divisor(self, batch: Mapping[str, Any], outputs: Any, samples: int) -> float:
        """What the sum of the samples' losses was divided by.

        Args:
            batch: the model's keyword arguments.
            outputs: what it returned.
            samples: how many samples the batch has.

        Raises:
            CaptureError: the loss is neither kind of mean.
        """
        targets = self.targets(batch)
        if targets is None:
            return float(samples)
        if self._guess and not self._checked and _fits_shifted(targets, outputs):
            self._shifts, self._guess, targets = True, False, _shifted(targets)
        own = float(targets.ne(IGNORED).sum())
        if not own:
            return 1.0  # there is no gradient whose divisor it could be
        given = batch.get("num_items_in_batch")
        step = own if given is None else float(given)
        if abs(step - own) <= CLOSE * own:
            self._check(own, outputs, targets)
            return step
        if self._divides_by_step is None:
            self._divides_by_step = _divides_by(step, own, outputs, targets)
            self._checked = True
        return step if self._divides_by_step else own

    def _check(self, own: float, outputs: Any, targets: Tensor) -> None:
        """Say once where the loss is not the mean over its labels that it is taken for."""
        if self._checked:
            return
        self._checked = True
        found = _found_divisor(outputs, targets)
        # One label for each sample is a mean over samples whatever it is; that of a causal model is known by its name.
        unknown = found is None and targets.ndim > 1 and not self._shifts
        if unknown or (found is not None and _distance(found, own, outputs) > 1):
            what = "does not show in its logits" if found is None else f"divides their sum by {found:.4g}"
            warnings.warn(
                f"the model's loss is taken for the mean cross-entropy of its {own:.0f} labels in a batch, and {what}: "
                "rows are the batch's gradient, split by sample, times that number, and no gradients of samples' own "
                "losses where the loss couples samples or counts something else",
                RuntimeWarning,
                stacklevel=6,
            )

    def targets(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Whole-number labels as the loss sees them, one for each prediction; None for other losses."""
        labels, shifted = batch.get("labels"), batch.get("shift_labels")
        if isinstance(shifted, Tensor):
            return shifted
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return None
        if self._shifts and labels.ndim > 1:
            return _shifted(labels)
        return labels


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model compares each position with the label of the next."""
    unwrap = getattr(model, "get_base_model", None)  # of a model with adapters
    base = unwrap() if callable(unwrap) else model
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    function = getattr(base, "loss_function", None)
    return getattr(function, "__name__", "") == "ForCausalLMLoss"


def _shifted(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def _fits_shifted(labels: Tensor, outputs: Any) -> bool:
    """Whether the loss is the mean over the labels only where each position is compared with the label of the next."""
    if labels.ndim < 2:
        return False
    fits = []
    for targets in (labels, _shifted(labels)):
        own, found = float(targets.ne(IGNORED).sum()), _found_divisor(outputs, targets)
        fits.append(bool(own) and found is not None and _distance(found, own, outputs) <= 1)
    return fits == [False, True]


def _distance(found: float, expected: float, outputs: Any) -> float:
    """Between two divisors; 1 is what rounding may make."""
    loss = loss_of(outputs)
    exact = loss is not None and loss.dtype in (torch.float32, torch.float64)
    return abs(found - expected) / expected / (CLOSE if exact else ROUGH)


def _found_divisor(outputs: Any, targets: Tensor) -> float | None:
    """What the summed cross-entropy of the labels was divided by; None where the logits are not those of the labels."""
    loss, logits = loss_of(outputs), logits_of(outputs)
    if loss is None or logits is None or logits.shape[:-1] != targets.shape:
        return None
    with torch.no_grad():
        flat = logits.detach().reshape(-1, logits.shape[-1]).float()
        total = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="sum")
        return float(total / loss.detach())


def _divides_by(step: float, own: float, outputs: Any, targets: Tensor) -> bool:
    """Whether the loss is the sum divided by ``step`` rather than by ``own``."""
    found = _found_divisor(outputs, targets)
    if found is None:
        return True  # what the trainer asks of models that it gives the count to
    from_step, from_own = _distance(found, step, outputs), _distance(found, own, outputs)
    if min(from_step, from_own) <= 1:
        return from_step <= from_own
    raise CaptureError(
        f"the model's loss is its summed cross-entropy divided by {found:.6g}, which is neither the {own:.6g} items of "
        f"its batch nor the {step:.6g} of the accumulated step, so rows could not be scaled; train with "
        "gradient_accumulation_steps=1, or log this model in a loop of your own"
    )


def loss_of(outputs: Any) -> Tensor | None:
    """The loss that a model returned, None if it returned none."""
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    else:
        loss = outputs[0] if isinstance(outputs, tuple | list) and outputs else None
    return loss if isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point() else None


def logits_of(outputs: Any) -> Tensor | None:
    """The logits that a model returned, None if it returned none."""
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    else:
        logits = outputs[1] if isinstance(outputs, tuple | list) and len(outputs) > 1 else None
    return logits if isinstance(logits, Tensor) else None
