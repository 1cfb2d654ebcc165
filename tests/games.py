"""Small problems whose every subset can be enumerated: ridge regression, and its Shapley values by definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logix_like.retraining import SubsetOracle

PENALTY = 0.5


class Ridge:
    """Ridge regression on ``n`` random samples; measured is minus the squared error on 3 queries, and their mean."""

    def __init__(self, n: int = 8, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.n = n
        self.x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        self.y = torch.randn(n, generator=generator, dtype=torch.float64)
        self.query_x = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        self.query_y = torch.randn(3, generator=generator, dtype=torch.float64)
        self.trained: list[tuple[int, ...]] = []
        self._values: dict[tuple[int, ...], Tensor] = {}

    def train(self, samples: list[int], seed: int) -> Tensor:
        self.trained.append(tuple(samples))
        x, y = self.x[samples], self.y[samples]
        return torch.linalg.solve(x.T @ x + PENALTY * torch.eye(3, dtype=torch.float64), x.T @ y)

    def measure(self, weights: Tensor) -> Tensor:
        errors = -(self.query_x @ weights - self.query_y).square()
        return torch.cat([errors, errors.mean().unsqueeze(0)])

    def value(self, subset: tuple[int, ...]) -> Tensor:
        known = tuple(sorted(subset))
        if known not in self._values:
            self._values[known] = self.measure(self.train(list(known), 0))
        return self._values[known]

    def oracle(self, cache: Path | None = None, **options: Any) -> SubsetOracle:
        return SubsetOracle(self.train, self.measure, self.n, cache=cache, **options)


def shapley(value: Callable[[tuple[int, ...]], Tensor], n: int) -> Tensor:
    """``[queries, n]`` by the definition over subsets."""
    found = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        gains = [
            (value((*s, i)) - value(s)) / (n * math.comb(n - 1, k))
            for k in range(n)
            for s in itertools.combinations(others, k)
        ]
        found.append(torch.stack(gains).sum(0))
    return torch.stack(found, 1)


def downsampling(value: Callable[[tuple[int, ...]], Tensor], n: int, size: int) -> Tensor:
    """``[queries, n]``: mean over subsets of ``size`` with a sample less that over those without it."""
    subsets = list(itertools.combinations(range(n), size))
    found = []
    for i in range(n):
        inside = torch.stack([value(s) for s in subsets if i in s]).mean(0)
        outside = torch.stack([value(s) for s in subsets if i not in s]).mean(0)
        found.append(inside - outside)
    return torch.stack(found, 1)
