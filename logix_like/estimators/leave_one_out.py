"""Leave-one-out: train once without each sample."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from logix_like.estimators.retrained import RetrainedEstimator
from logix_like.subsets import without_each


class LeaveOneOut(RetrainedEstimator):
    """``v(N) - v(N without i)``: what is lost when sample ``i`` is left out; ``n + 1`` trainings a seed.

    What influence functions approximate (Koh and Liang 2017). With a training that is itself random the difference of
    one sample often drowns in noise: give the oracle several seeds, or use :class:`Downsampling`.
    """

    name: ClassVar[str] = "leave-one-out"

    def _estimate(self) -> Tensor:
        without = self._oracle.values(without_each(self._oracle.n))
        return (self._oracle.full() - without).T.contiguous()
