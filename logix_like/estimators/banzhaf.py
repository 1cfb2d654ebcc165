"""Data Banzhaf values, in which every subset counts the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from logix_like.estimators.retrained import RetrainedEstimator, difference_of_means
from logix_like.layout import DataId
from logix_like.retraining import SubsetOracle
from logix_like.subsets import all_subsets, coin_subsets


class Banzhaf(RetrainedEstimator):
    """The mean of ``v(S with i) - v(S)`` over all subsets ``S`` without ``i`` (Wang and Jia 2023).

    Estimated by maximum sample reuse: every trained subset serves every sample (their eq. 7). Of the values that mean
    over subsets it is the one whose ranking suffers least from noise in training.

    Args:
        oracle: Trains and measures.
        subsets: How many are drawn, each sample in half of them; None takes all there are, of at most 12 samples.
        seed: Of the draw.
        data_id: The samples' names, 0, 1, ... unless given.
        own: Index of the measured quantity that is each sample's own output.
    """

    name: ClassVar[str] = "Banzhaf"

    def __init__(
        self,
        oracle: SubsetOracle,
        *,
        subsets: int | None = 1000,
        seed: int = 0,
        data_id: Sequence[DataId] | None = None,
        own: Sequence[int] | None = None,
    ) -> None:
        super().__init__(oracle, data_id=data_id, own=own)
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
            return difference_of_means(masks, self._oracle.values(masks))[0]
        masks = coin_subsets(n, self._subsets, torch.Generator().manual_seed(self._seed))
        differences, self._errors = difference_of_means(masks, self._oracle.values(masks))
        return differences
