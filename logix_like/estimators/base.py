"""What all estimators answer: scores of training samples for queries, and for themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from logix_like.damping import DampingSetting
from logix_like.errors import QueryError
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

    @property
    def note(self) -> str:
        """What the last scores are, in words."""
        return f"{self.name}."

    def influence(
        self, queries: Any, query_id: Sequence[DataId] | None = None, k: int | None = None
    ) -> InfluenceResult:
        """Scores as a result with rankings, tables, files and the report; queries are numbered unless named.

        With ``k`` it holds only the k highest and lowest of each query, else all. Samples of scores that are not
        finite are left out, as the result's note says.

        Raises:
            QueryError: there is not one name for each query, no sample has finite scores, or not k of them.
        """
        scores, data_id, note = self.scores(queries), self.data_id, self.note
        if query_id is not None and len(query_id) != len(scores):
            raise QueryError(f"{len(query_id)} ids were given for {len(scores)} queries; give one for each")
        finite = scores.isfinite().all(0)
        if not bool(finite.all()):
            left_out = data_id[~finite.numpy()]
            if not bool(finite.any()):
                raise QueryError(
                    "no sample has finite scores: the model gives losses that are not, or curvature is lacking"
                )
            scores, data_id = scores[:, finite], data_id[finite.numpy()]
            listed = ", ".join(map(repr, left_out[:5].tolist())) + (", ..." if len(left_out) > 5 else "")
            note += f" Left out, since their scores are not finite: {len(left_out)} samples ({listed})."
        result = InfluenceResult(
            query_id=tuple(range(len(scores))) if query_id is None else tuple(query_id),
            samples=scores.shape[1],
            mode="dot",
            preconditioner=self.name,
            damping=self.damping_setting,
            reduce="sum",  # one score for a sample, whatever number of visits is in it
            engine=self.name,
            note=note,
            data_id=data_id,
            scores=scores,
        )
        if k is None:
            return result
        return replace(result, top=result.proponents(k), bottom=result.opponents(k), data_id=None, scores=None)
