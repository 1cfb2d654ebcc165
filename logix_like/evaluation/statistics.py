"""Ranks, correlations and intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logix_like.errors import EvaluationError, MissingDependencyError

DRAWS = 1000
"""Of a bootstrap."""


def ranks(values: Tensor) -> Tensor:
    """Ranks along the first dimension, float64; equal values share the mean of theirs."""
    try:
        from scipy.stats import rankdata
    except ImportError as error:
        raise MissingDependencyError(
            "evaluation ranks by scipy, which is not installed: pip install 'logix_like[evaluation]'"
        ) from error
    ranked: NDArray[Any] = rankdata(values.detach().cpu().numpy(), axis=0)
    return torch.from_numpy(np.ascontiguousarray(ranked, dtype=np.float64))


def correlation(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Pearson's correlation of the columns of ``a`` and ``b`` (both ``[m, q]``): ``[q]``.

    With ``weights [b, m]`` (how often each line counts), ``[b, q]``. 0 where a side is constant: it tells nothing.
    """
    a, b = a - a.mean(0), b - b.mean(0)
    counted = torch.ones(1, len(a), dtype=a.dtype) if weights is None else weights.to(a.dtype)
    counted = counted / counted.sum(1, keepdim=True)
    mean_a, mean_b = counted @ a, counted @ b
    covariance = counted @ (a * b) - mean_a * mean_b
    scale = (counted @ a.square() - mean_a.square()) * (counted @ b.square() - mean_b.square())
    # What rounding leaves of a constant side is no variation.
    floor = 1e-24 * (a.square().mean(0) * b.square().mean(0))
    found = torch.where(scale > floor, covariance / scale.clamp_min(torch.finfo(a.dtype).tiny).sqrt(), 0.0)
    return found[0] if weights is None else found


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of the columns of ``a`` and ``b`` (both ``[m, q]``): ``[q]``."""
    return correlation(ranks(a), ranks(b))


def resampled(count: int, draws: int, generator: torch.Generator) -> Tensor:
    """``[draws, count]``: how often each of ``count`` is drawn, with replacement, ``count`` times (the bootstrap)."""
    chosen = torch.randint(count, (draws, count), generator=generator)
    return torch.zeros(draws, count, dtype=torch.float64).scatter_add_(
        1, chosen, torch.ones(1, dtype=torch.float64).expand(draws, count)
    )


def bootstrapped(a: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
    """``[draws]``: mean over columns of the correlations of ``a`` and ``b`` (``[m, q]``), lines and columns redrawn.

    Give ranks for Spearman's: those of the whole stand in for those of each draw, in which equal lines would be ties.
    """
    lines, columns = resampled(len(a), DRAWS, generator), resampled(a.shape[1], DRAWS, generator)
    return (correlation(a, b, lines) * columns).sum(1) / a.shape[1]


def mean_and_error(values: Tensor) -> str:
    """``+0.1234 +- 0.0123``: mean and standard error of ``values [n]``; of a single one the error is unknown."""
    mean = f"{values.mean().item():+.4f}"
    return mean if len(values) < 2 else f"{mean} +- {values.std().item() / len(values) ** 0.5:.4f}"


def interval(draws: Tensor, level: float) -> tuple[float, float]:
    """The middle ``level`` of ``draws [n]``.

    Raises:
        EvaluationError: ``level`` is no share.
    """
    if not 0 < level < 1:
        raise EvaluationError(f"level is {level}; an interval holds a share between 0 and 1, e.g. 0.95")
    low, high = torch.quantile(draws.double(), torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return low.item(), high.item()
