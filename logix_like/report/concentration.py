"""How concentrated influence is: in few samples, or spread over many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def share_of_first(scores: Floats, share: float = 0.01) -> float:
    """How much of the sum of ``|scores|`` the strongest ``share`` of the samples hold, from 0 to 1.

    At least one sample counts; without any score that is not zero, 0.
    """
    strength = np.abs(np.asarray(scores, dtype=np.float64))
    total = strength.sum()
    first = max(1, round(share * strength.size))
    if not total > 0:
        return 0.0
    return float(np.partition(strength, strength.size - first)[-first:].sum() / total)


def held_by(scores: Floats, shares: Sequence[float]) -> NDArray[np.float64]:
    """For each share of the samples, the strongest first, how much of the sum of ``|scores|`` they hold."""
    strength = np.sort(np.abs(np.asarray(scores, dtype=np.float64)))[::-1]
    running = np.concatenate([[0.0], np.cumsum(strength)])
    total = running[-1] or 1.0
    places = np.asarray(shares) * strength.size
    return np.asarray(np.interp(places, np.arange(strength.size + 1), running / total), dtype=np.float64)
