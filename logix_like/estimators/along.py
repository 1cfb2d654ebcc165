"""What estimators over a recorded training share: the samples' columns, and adding up over visits."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from logix_like.estimators.base import Estimator
from logix_like.estimators.flat import DataOf, checked, require_chunk, require_queries
from logix_like.estimators.replay import Point, Replay
from logix_like.layout import DataId
from logix_like.objective import Batch, Objective
from logix_like.path import TrainingPath
from logix_like.query.result import Ids
from logix_like.weights import differentiable


def as_ids(ids: tuple[DataId, ...]) -> Ids:
    """Ids as results hold them."""
    array = np.empty(len(ids), dtype=object)
    array[:] = ids
    return array


class PathEstimator(Estimator):
    """Scores by walking a recorded training once more.

    Sign: a positive score means that training on the sample lowered the query's loss (a proponent, helpful);
    negative, that it raised it (an opponent, harmful). A score estimates how far the query's loss would have been
    higher without the sample's visits. A query is a batch of data; scores are ``[queries, samples]``.

    Args:
        path: the recorded training, ``run.training_path``.
        model: the model that was trained (its present weights do not matter and are left as they are).
        objective: what it was trained for.
        data: gives the batch of some ids, in their order, as the training loop had it.
        chunk: queries that are walked together when every sample is a query of its own.

    Raises:
        ModelMismatchError: the path was recorded with another model.
        ConfigError: the optimizer has no known update rule (lists the known).
        StoreError: there are no checkpoints to begin at.
    """

    def __init__(
        self, path: TrainingPath, model: nn.Module, objective: Objective, data: DataOf, *, chunk: int = 64
    ) -> None:
        self._data = checked(data)
        self._replay = Replay(path, model, objective, self._data)
        self._model = model
        self._chunk = require_chunk(chunk)
        self._ids = path.data_id
        self._column = {name: number for number, name in enumerate(self._ids)}

    @property
    def data_id(self) -> Ids:
        return as_ids(self._ids)

    def scores(self, queries: Batch) -> Tensor:
        """``[queries, samples]``, in float32 at least."""
        with differentiable(self._model):
            return self._walk(queries)

    def self_influence(self) -> Tensor:
        """``[samples]``: every sample asked about itself, which walks the path once for every ``chunk`` samples."""
        found = []
        for start in range(0, len(self._ids), self._chunk):
            ids = self._ids[start : start + self._chunk]
            scores = self.scores(self._data(ids))
            found.append(scores[:, start : start + len(ids)].diagonal())
        return torch.cat(found)

    @abstractmethod
    def _walk(self, queries: Batch) -> Tensor:
        """The scores; the model is in eval mode meanwhile."""

    def _gradients(self, theta: Tensor, queries: Batch) -> Tensor:
        return self._replay.flat.sample_gradients(theta, require_queries(queries))

    def _add(self, scores: Tensor, point: Point, directions: Tensor) -> None:
        """Add each visit's gradient times ``directions [queries, parameters]`` to its sample's column."""
        for block in point.step.blocks:
            rows = self._replay.flat.sample_gradients(point.theta, self._data(block.data_id))
            columns = torch.tensor([self._column[one] for one in block.data_id], device=scores.device)
            scores.index_add_(1, columns, (directions @ rows.T).to(scores) * block.weight)


def scores_of(queries: Tensor, samples: int) -> Tensor:
    """Zeros ``[queries, samples]`` of the gradients' type."""
    return queries.new_zeros(len(queries), samples)
