"""What all estimators answer: scores of training samples for queries, and for themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from logix_like.damping import DampingSetting
from logix_like.layout import DataId
from logix_like.query.result import Ids, InfluenceResult


class Estimator(ABC):
    """Scores training samples.

    Sign: a positive score means that training on the sample lowered the query's loss (a proponent, helpful);
    negative, that it raised it (an opponent, harmful). What a query is, the leaf says: a batch of data, captured
    gradients, or indices of what was measured.
    """

    name: ClassVar[str]
    """What the field calls it."""

    @property
    @abstractmethod
    def data_id(self) -> Ids:
        """``[samples]``: the training samples, in the order of the scores' columns."""

    @abstractmethod
    def scores(self, queries: Any) -> Tensor:
        """``[queries, samples]``."""

    @abstractmethod
    def self_influence(self) -> Tensor:
        """``[samples]``: the score of each sample for itself."""

    @property
    def damping_setting(self) -> DampingSetting:
        """What its results say of damping; 0 where there is none."""
        return 0.0

    def influence(self, queries: Any, query_id: tuple[DataId, ...] | None = None) -> InfluenceResult:
        """All scores as a result with rankings, tables, files and the report; queries are numbered unless named."""
        scores = self.scores(queries)
        return InfluenceResult(
            query_id=tuple(range(len(scores))) if query_id is None else query_id,
            samples=scores.shape[1],
            mode="dot",
            preconditioner=self.name,
            damping=self.damping_setting,
            reduce="sum",  # one score for a sample, whatever number of visits is in it
            engine=self.name,
            note=f"{self.name}.",
            data_id=self.data_id,
            scores=scores,
        )
