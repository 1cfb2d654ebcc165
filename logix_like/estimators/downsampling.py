"""Memorisation and influence by training on random subsets of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from logix_like.errors import RetrainingError
from logix_like.estimators.retrained import RetrainedEstimator, difference_of_means
from logix_like.layout import DataId
from logix_like.retraining import SubsetOracle
from logix_like.subsets import all_subsets, random_subsets


class Downsampling(RetrainedEstimator):
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
        super().__init__(oracle, data_id=data_id, own=own)
        self._size = round(share * oracle.n)
        if not 0 < self._size < oracle.n:
            raise RetrainingError(
                f"share is {share}: subsets of {self._size} of {oracle.n} samples; each sample must be in some and "
                "missing in others"
            )
        self._subsets, self._seed = subsets, seed
        self._errors: Tensor | None = None

    def standard_errors(self) -> Tensor:
        """``[all queries, samples]``: standard errors of the scores; 0 when all subsets were taken."""
        values = self.values
        return torch.zeros_like(values) if self._errors is None else self._errors

    def _estimate(self) -> Tensor:
        n = self._oracle.n
        if self._subsets is None:
            masks = all_subsets(n)
            masks = masks[masks.sum(1) == self._size]
            return difference_of_means(masks, self._oracle.values(masks))[0]
        masks = random_subsets(n, self._size, self._subsets, torch.Generator().manual_seed(self._seed))
        differences, self._errors = difference_of_means(masks, self._oracle.values(masks))
        return differences
