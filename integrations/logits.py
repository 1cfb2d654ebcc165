"""How much a loss outside the model counts each sample: read off the gradient that reaches the logits.

A trainer may compute the loss itself (label smoothing, ``compute_loss_func``), from labels that the model never sees.
Whatever it divides by, a cross-entropy gives the logits of each counted position the gradient
``c (softmax - target)``, with one ``c`` for all and ``target = (1 - e) onehot(label) + e / classes``. So ``c`` and the
labels follow from the logits and their gradient, and that the loss is such a one is checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logix_like.errors import CaptureError

POSITIONS = 64
"""So many of the counted positions are looked at, evenly spread."""
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative difference that rounding may make, by the gradient's dtype."""
ROUGH = 5e-2
"""The same in 16 bits."""


def cross_entropy_factor(logits: Tensor, gradient: Tensor, smoothing: float) -> float:
    """``c``: what the sum of the samples' losses was multiplied by before the backward pass.

    Args:
        logits: ``[..., classes]``.
        gradient: of the loss, of that shape.
        smoothing: ``e``, the share of the target that is spread over all classes.

    Raises:
        CaptureError: the loss is no cross-entropy of these logits, or counts their positions unequally.
    """
    received = gradient.detach().reshape(-1, gradient.shape[-1])
    counted = received.abs().amax(-1).nonzero().flatten()
    if not len(counted):
        raise CaptureError("the loss gives the logits no gradient at all, so rows could not be scaled")
    chosen = counted[:: -(-len(counted) // POSITIONS)]
    received = received[chosen].double()
    chances = logits.detach().reshape(-1, logits.shape[-1])[chosen].double().softmax(-1)
    # The label has the most negative gradient, unless smoothing holds back a class that is surer than its target.
    guesses = [_residual(chances, label, smoothing) for label in (received.argmin(-1), chances.argmax(-1))]
    misfit = torch.stack([_misfit(received, guess) for guess in guesses])
    fitting = torch.where((misfit[0] <= misfit[1]).unsqueeze(-1), guesses[0], guesses[1])
    factor = float((received * fitting).sum() / fitting.square().sum())
    slack = CLOSE.get(gradient.dtype, ROUGH) if logits.dtype == gradient.dtype else ROUGH
    if not factor > 0 or not float((received - factor * fitting).norm()) <= slack * float(received.norm()):
        raise CaptureError(
            "the loss that was trained on is neither the one that the model returned nor a cross-entropy of its "
            "logits with one weight for all samples (a compute_loss_func or a compute_loss of one's own), so rows "
            "could not be scaled; have the model return its loss, or log in a loop of your own"
        )
    return factor


def token_factor(log_chances: Tensor, gradient: Tensor) -> float:
    """``c`` of a loss ``-c sum(weight * log_chances)``, which trl computes from the labels' log-probabilities.

    The weight of each counted token is 1 (``loss_type="nll"``), or its probability, held fixed (``"dft"``).

    Raises:
        CaptureError: the loss is neither.
    """
    received = gradient.detach().double().flatten()
    counted = received != 0
    chances = log_chances.detach().double().exp().flatten()
    slack = CLOSE.get(gradient.dtype, ROUGH)
    for weights in (torch.ones_like(chances), chances):
        expected = weights * counted
        factor = -float((received * expected).sum() / expected.square().sum().clamp_min(1e-300))
        if factor > 0 and float((received + factor * expected).norm()) <= slack * float(received.norm()):
            return factor
    raise CaptureError(
        "the loss that was trained on weights its tokens unequally (it is neither the 'nll' nor the 'dft' loss of "
        "trl), so rows could not be scaled; use one of these, or log in a loop of your own"
    )


def _residual(chances: Tensor, label: Tensor, smoothing: float) -> Tensor:
    target = torch.full_like(chances, smoothing / chances.shape[-1])
    target.scatter_add_(
        -1, label.unsqueeze(-1), torch.full_like(label.unsqueeze(-1), 1.0 - smoothing, dtype=target.dtype)
    )
    return chances - target


def _misfit(received: Tensor, guess: Tensor) -> Tensor:
    """By position: what is left of the gradient that no multiple of ``guess`` explains."""
    multiple = (received * guess).sum(-1, keepdim=True) / guess.square().sum(-1, keepdim=True).clamp_min(1e-300)
    left: Tensor = (received - multiple.clamp_min(0) * guess).norm(dim=-1)
    return left
