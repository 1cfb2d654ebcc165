"""A world in which the truth is known: what is measured is the sum of the samples' own effects, perhaps with noise."""

from __future__ import annotations

import torch
from torch import Tensor

from logix_like.retraining import SubsetOracle


class Additive:
    """``n`` samples, ``q`` queries; ``effects [q, n]`` are the true scores."""

    def __init__(self, n: int = 60, q: int = 20, noise: float = 0.0, seeds: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.effects = torch.randn(q, n, generator=generator, dtype=torch.float64)
        self._noise = noise * self.effects.std() * (n / 4) ** 0.5
        """In units of the spread that random halves have."""
        self.oracle = SubsetOracle(self._train, lambda values: values, n, seeds=seeds)

    def _train(self, samples: list[int], seed: int) -> Tensor:
        noise = torch.randn(len(self.effects), generator=torch.Generator().manual_seed(hash((*samples, seed)) % 2**62))
        return self.effects[:, samples].sum(1) + self._noise * noise
