"""What the examples measure: how well a score finds something, and what logging costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Batch = TypeVar("Batch")


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive sample has a higher score than another one (0.5: scores tell nothing).

    ``scores [n]`` and ``positive [n]`` (bool, some of each kind); equal scores count one half.
    """
    difference = scores[positive].unsqueeze(1) - scores[~positive].unsqueeze(0)
    return ((difference > 0).double().mean() + (difference == 0).double().mean() / 2).item()


@dataclass(frozen=True)
class Overhead:
    """How long logged steps take beside plain ones."""

    plain: float
    """Median seconds of a plain step."""
    logged: float
    """Median seconds of a logged step."""
    ratio: float
    """Median over the pairs of logged to plain."""
    pairs: int

    def __str__(self) -> str:
        return (
            f"a logged step takes {self.ratio:.2f} x a plain one (median of {self.pairs} pairs in turn: "
            f"{self.logged * 1e3:.1f} ms to {self.plain * 1e3:.1f} ms)"
        )


def compare_steps(
    plain: Callable[[Batch], object], logged: Callable[[Batch], object], batches: Iterable[Batch], warmup: int = 3
) -> Overhead:
    """Do both steps on each batch, changing who goes first; the first ``warmup`` batches are not counted."""
    pairs = []
    for number, batch in enumerate(batches):
        order = (plain, logged) if number % 2 else (logged, plain)
        seconds = {step: _seconds(step, batch) for step in order}
        pairs.append((seconds[plain], seconds[logged]))
    counted = pairs[warmup:]
    return Overhead(
        plain=statistics.median(alone for alone, _ in counted),
        logged=statistics.median(with_log for _, with_log in counted),
        ratio=statistics.median(with_log / alone for alone, with_log in counted),
        pairs=len(counted),
    )


def _seconds(step: Callable[[Batch], object], batch: Batch) -> float:
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start
