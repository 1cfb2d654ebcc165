"""Data Shapley values: exact for a dozen samples, by permutations beyond."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from logix_like.errors import RetrainingError
from logix_like.estimators.retrained import RetrainedEstimator
from logix_like.layout import DataId
from logix_like.retraining import SubsetOracle
from logix_like.subsets import all_subsets, whole_number


class ExactShapley(RetrainedEstimator):
    """Data Shapley by all ``2^n`` subsets, of at most 12 samples (Ghorbani and Zou 2019, eq. 1).

    The values of all samples sum to ``v(N) - v(nothing)``.
    """

    name: ClassVar[str] = "Shapley (exact)"

    def _estimate(self) -> Tensor:
        n = self._oracle.n
        masks = all_subsets(n)
        values = self._oracle.values(masks)
        sizes = torch.arange(n, dtype=torch.float64)
        # A subset of s samples without i comes before i in s! (n - 1 - s)! of n! orders.
        log_weights = torch.lgamma(sizes + 1) + torch.lgamma(n - sizes) - math.lgamma(n + 1)
        before = log_weights.exp()
        found = []
        for sample in range(n):
            without = (~masks[:, sample]).nonzero().flatten()
            gains = values[without + 2**sample] - values[without]  # line s of all_subsets is subset number s
            found.append(before[masks[without].sum(1)] @ gains)
        return torch.stack(found, 1)


class Shapley(RetrainedEstimator):
    """Data Shapley by random permutations, stopped when sure enough (Ghorbani and Zou 2019, algorithm 1).

    A sample's value is the mean of what it adds to those before it. Whatever the number of permutations, values sum
    to ``v(N) - v(nothing)`` (up to ``truncation``).

    Args:
        oracle: Trains and measures; give it ``empty=`` unless it can train on no samples.
        permutations: At most so many; a warning says when they did not suffice for ``tolerance``.
        tolerance: Stop when every standard error is below this share of ``|v(N) - v(nothing)|``.
        truncation: A permutation ends where all queries are within this share of ``v(N)``; the samples behind get 0
            from it (truncated Monte Carlo: cheaper, and off by at most this share in sum). 0 for none.
        batch: Permutations between two looks at the standard errors; they are trained side by side.
        seed: Of the draw.
        data_id: The samples' names, 0, 1, ... unless given.
        own: Index of the measured quantity that is each sample's own output.
    """

    name: ClassVar[str] = "Shapley"

    def __init__(
        self,
        oracle: SubsetOracle,
        *,
        permutations: int = 1000,
        tolerance: float = 0.01,
        truncation: float = 0.0,
        batch: int = 10,
        seed: int = 0,
        data_id: Sequence[DataId] | None = None,
        own: Sequence[int] | None = None,
    ) -> None:
        super().__init__(oracle, data_id=data_id, own=own)
        if whole_number(permutations, "permutations") < 2 or whole_number(batch, "batch") < 2:
            raise RetrainingError(
                f"permutations is {permutations} and batch {batch}; standard errors need at least 2 of each"
            )
        if not (tolerance >= 0 and 0 <= truncation < 1):
            raise RetrainingError(
                f"tolerance is {tolerance} and truncation {truncation}; they are shares of |v(N) - v(nothing)|, at "
                "least 0, and truncation is below 1"
            )
        self._most, self._batch, self._seed = permutations, batch, seed
        self._tolerance, self._truncation = tolerance, truncation
        self._gains: list[Tensor] = []

    @property
    def permutations(self) -> int:
        """How many were drawn."""
        return len(self._all_gains())

    def standard_errors(self) -> Tensor:
        """``[all queries, samples]``: standard errors of the scores."""
        return _standard_errors(self._all_gains())

    def _all_gains(self) -> Tensor:
        _ = self.values  # estimated by now
        return torch.cat(self._gains)

    def _estimate(self) -> Tensor:
        total = (self._oracle.full() - self._nothing()).abs()
        generator = torch.Generator().manual_seed(self._seed)
        drawn = 0
        self._gains.clear()  # of an attempt that broke off
        while drawn < self._most:
            count = min(self._batch, self._most - drawn)
            order = torch.rand(count, self._oracle.n, generator=generator).argsort(1)
            self._gains.append(self._gains_of(order, total))
            drawn += count
            errors = _standard_errors(torch.cat(self._gains))
            largest = errors.amax(1)
            # A quantity that no sample changes is known, whatever it is a share of.
            unsure = largest[(largest > 0) & ~(largest <= self._tolerance * total)]
            if not len(unsure):
                break
        else:
            share = (largest / total)[largest > 0].max().item()
            warnings.warn(
                f"after {drawn} permutations the largest standard error is {share:.2g} of v(N) - v(nothing), above the "
                f"tolerance {self._tolerance}; allow more permutations, or look at standard_errors()",
                RuntimeWarning,
                stacklevel=4,
            )
        return torch.cat(self._gains).mean(0)

    def _nothing(self) -> Tensor:
        return self._oracle.values(torch.zeros(1, self._oracle.n, dtype=torch.bool))[0]

    def _gains_of(self, order: Tensor, total: Tensor) -> Tensor:
        """``[permutations, queries, n]``: what each sample adds to those before it in ``order [permutations, n]``."""
        prefixes = self._prefix_values(order, total)
        gains = prefixes.diff(dim=1).transpose(1, 2).contiguous()
        places = order.unsqueeze(1).expand_as(gains)
        return torch.zeros_like(gains).scatter_(2, places, gains)

    def _prefix_values(self, order: Tensor, total: Tensor) -> Tensor:
        """``[permutations, n + 1, queries]``: measured after the first 0, 1, ..., n samples of each permutation."""
        count, n = order.shape
        rank = order.argsort(1)
        if not self._truncation:
            masks = rank.unsqueeze(1) < torch.arange(n + 1).unsqueeze(1)
            return self._oracle.values(masks.flatten(0, 1)).view(count, n + 1, -1)
        full, held = self._oracle.full(), self._nothing().expand(count, -1).clone()
        values = [held]
        for size in range(1, n + 1):
            going = ((full - held).abs() > self._truncation * total).any(1)
            if bool(going.any()):
                held = held.clone()
                held[going] = self._oracle.values(rank[going] < size)
            values.append(held)
        return torch.stack(values, 1)


def _standard_errors(gains: Tensor) -> Tensor:
    return gains.std(0) / math.sqrt(len(gains))
