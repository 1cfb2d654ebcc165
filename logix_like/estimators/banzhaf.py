"""Data Banzhaf values, in which every subset counts the same."""

from __future__ import annotations

from typing import ClassVar

from torch import Generator, Tensor

from logix_like.estimators.retrained import SampledSubsets
from logix_like.subsets import coin_subsets


class Banzhaf(SampledSubsets):
    """The mean of ``v(S with i) - v(S)`` over all subsets ``S`` without ``i`` (Wang and Jia 2023).

    Estimated by maximum sample reuse: every trained subset serves every sample (their eq. 7), and is drawn with half of
    them. Of the values that mean over subsets it is the one whose ranking suffers least from noise in training.
    Arguments are those of :class:`~logix_like.estimators.retrained.SampledSubsets`.
    """

    name: ClassVar[str] = "Banzhaf"

    def _among(self, masks: Tensor) -> Tensor:
        return masks

    def _drawn(self, count: int, generator: Generator) -> Tensor:
        return coin_subsets(self._oracle.n, count, generator)
