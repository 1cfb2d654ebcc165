"""Subsets of training samples: ``[subsets, n]`` masks, drawn or enumerated, and the name of each."""

from __future__ import annotations

import hashlib
import math
import operator
from typing import Any

import torch
from torch import Tensor

from logix_like.errors import RetrainingError

MOST_ENUMERATED = 12
"""All subsets of at most so many samples are enumerated (4,096 of them)."""


def whole_number(value: Any, what: str) -> int:
    """``value`` as an int; :class:`RetrainingError` where it is none."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise RetrainingError(f"{what} is {value!r}; it must be a whole number") from error


def size_of(share: Any, n: int) -> int:
    """How many of ``n`` samples a share of them is, rounded; 0 for what is no number, which no caller takes."""
    try:
        samples = float(share) * n
    except (TypeError, ValueError, RuntimeError):
        return 0
    return round(samples) if math.isfinite(samples) else 0


def random_subsets(n: int, size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` subsets of ``size`` samples each, every one equally likely: ``[count, n]`` bool."""
    count = _drawn(count)
    if not 0 <= size <= n:
        raise RetrainingError(f"subsets of {size} samples were asked for, but there are {n}")
    order = torch.rand(count, n, generator=generator, dtype=torch.float64).argsort(1)
    masks = torch.zeros(count, n, dtype=torch.bool)
    return masks.scatter_(1, order[:, :size], True)


def coin_subsets(n: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` subsets that hold each sample with probability one half: ``[count, n]`` bool."""
    return torch.rand(_drawn(count), n, generator=generator) < 0.5


def _drawn(count: int) -> int:
    if whole_number(count, "the number of subsets") < 1:
        raise RetrainingError(f"the number of subsets is {count}; at least 1 must be drawn")
    return count


def all_subsets(n: int) -> Tensor:
    """All ``2^n`` subsets, ``[2^n, n]`` bool; line ``s`` holds sample ``i`` if bit ``i`` of ``s`` is set.

    Raises:
        RetrainingError: ``n`` is above 12.
    """
    if n > MOST_ENUMERATED:
        raise RetrainingError(
            f"all subsets of {n} samples are {2**n:,} retrainings; at most {MOST_ENUMERATED} samples are enumerated: "
            "use an estimator that draws subsets"
        )
    return (torch.arange(2**n).unsqueeze(1) >> torch.arange(n)) & 1 == 1


def without_each(n: int) -> Tensor:
    """The ``n`` subsets that lack one sample, ``[n, n]`` bool."""
    return ~torch.eye(n, dtype=torch.bool)


def subset_name(mask: Tensor) -> str:
    """BLAKE2b-128 hex of the samples in ``mask [n]``: equal for equal subsets, in this and any other process."""
    members = mask.nonzero().flatten().numpy().astype("<i8")
    return hashlib.blake2b(members.tobytes(), digest_size=16).hexdigest()


def as_subsets(masks: Any, n: int) -> Tensor:
    """``masks``, a tensor, an array or lists, as a ``[subsets, n]`` bool tensor.

    Raises:
        RetrainingError: they are none.
    """
    try:
        found: Tensor = torch.as_tensor(masks).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RetrainingError(
            f"subsets are a {type(masks).__name__}; give bool masks of shape (subsets, {n})"
        ) from error
    if found.dtype != torch.bool or found.ndim != 2 or found.shape[1] != n:
        raise RetrainingError(
            f"subsets are {found.dtype} of shape {tuple(found.shape)}; give bool masks of shape (subsets, {n}), true "
            "where a sample is trained on"
        )
    return found
