"""Memorisation and influence by training on random subsets of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Generator, Tensor

from logix_like.errors import RetrainingError
from logix_like.estimators.retrained import SampledSubsets
from logix_like.layout import DataId
from logix_like.retraining import SubsetOracle
from logix_like.subsets import random_subsets, size_of


class Downsampling(SampledSubsets):
    """``E[v(S) : i in S] - E[v(S) : i not in S]`` over subsets of one size (Feldman and Zhang 2020, eq. 1 to 3).

    Self-influence is what they call memorisation. The error falls as one over the root of the number of subsets.

    Args:
        oracle: Trains and measures.
        share: Size of a subset, as a share of all samples (0.7 in the paper).
        subsets: How many are drawn; None takes all there are, of at most 12 samples.
        seed: Of the draw.
        data_id: The samples' names, 0, 1, ... unless given.
        own: Index of the measured quantity that is each sample's own output.
    """

    name: ClassVar[str] = "downsampling"

    def __init__(
        self,
        oracle: SubsetOracle,
        *,
        share: float = 0.7,
        subsets: int | None = 1000,
        seed: int = 0,
        data_id: Sequence[DataId] | None = None,
        own: Sequence[int] | None = None,
    ) -> None:
        super().__init__(oracle, subsets=subsets, seed=seed, data_id=data_id, own=own)
        self._size = size_of(share, oracle.n)
        if not 0 < self._size < oracle.n:
            raise RetrainingError(
                f"share is {share}: subsets of {self._size} of {oracle.n} samples; each sample must be in some and "
                "missing in others"
            )

    def _among(self, masks: Tensor) -> Tensor:
        return masks[masks.sum(1) == self._size]

    def _drawn(self, count: int, generator: Generator) -> Tensor:
        return random_subsets(self._oracle.n, self._size, count, generator)
