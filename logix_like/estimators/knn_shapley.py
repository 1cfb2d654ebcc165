"""Shapley values of a nearest-neighbour classifier, in closed form: no retraining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from logix_like.errors import QueryError
from logix_like.estimators.base import Estimator
from logix_like.ids import as_data_ids
from logix_like.layout import DataId
from logix_like.query.result import Ids

TILE = 256
"""Queries at a time: memory beside the scores grows with this times the samples."""


class KNNShapley(Estimator):
    """Exact Shapley values for the k-nearest-neighbour classifier (Jia et al. 2019, theorem 1).

    The utility of a subset is the share of a query's k nearest neighbours in it that have the query's label (empty
    places count as wrong). Features of a trained network (its last hidden layer) make it a cheap stand-in for the
    network itself. A positive score means that the sample helps to get the query's label.

    Args:
        features: ``[samples, d]``; distances are Euclidean.
        labels: ``[samples]``.
        k: Neighbours.
        data_id: The samples' names, 0, 1, ... unless given.

    A query is a pair ``(features [queries, d], labels [queries])``.
    """

    name: ClassVar[str] = "kNN-Shapley"

    def __init__(
        self, features: Tensor, labels: Tensor, *, k: int = 5, data_id: Sequence[DataId] | None = None
    ) -> None:
        features, labels = _pair(features, labels, "the training samples")
        if not len(labels):
            raise QueryError("there are no training samples; nothing can be a neighbour")
        if not (k >= 1 and k % 1 == 0):
            raise QueryError(f"k is {k}; it must be a whole number: there must be at least 1 neighbour")
        names = as_data_ids(range(len(labels)) if data_id is None else data_id)
        if len(names) != len(labels):
            raise QueryError(f"data_id names {len(names)} samples, but there are {len(labels)}")
        self._features, self._labels, self._k = features, labels, k
        self._ids = np.empty(len(labels), dtype=object)
        self._ids[:] = names

    @property
    def data_id(self) -> Ids:
        """The samples' names."""
        return self._ids

    def scores(self, queries: Any) -> Tensor:
        """``[queries, samples]`` float64; the sum over samples is the utility of all of them."""
        try:
            given, asked = queries
        except (TypeError, ValueError) as error:
            raise QueryError("a query is a pair (features [queries, d], labels [queries])") from error
        features, labels = _pair(given, asked, "the queries", self._features.shape[1])
        parts = zip(features.split(TILE), labels.split(TILE), strict=True)
        return torch.cat([self._ranked(self._distances(x).argsort(dim=1, stable=True), y) for x, y in parts])

    def self_influence(self) -> Tensor:
        """``[samples]`` float64: each sample's score for a query with its own features and label.

        It is its own nearest neighbour then; large where the others around it have another label.
        """
        found = []
        for part in torch.arange(len(self._labels)).split(TILE):
            own = part.unsqueeze(1)
            # Before any sample of the same features, which may have another label.
            distances = self._distances(self._features[part]).scatter_(1, own, -1.0)
            values = self._ranked(distances.argsort(dim=1, stable=True), self._labels[part])
            found.append(values.gather(1, own).flatten())
        return torch.cat(found)

    def _distances(self, features: Tensor) -> Tensor:
        """``[queries, samples]`` float64."""
        # By way of products, which lose the digits that all features share.
        samples = self._features.double()
        centre = samples.mean(0)
        return torch.cdist(features.double() - centre, samples - centre)

    def _ranked(self, order: Tensor, labels: Tensor) -> Tensor:
        """Values by the recursion from the farthest sample to the nearest."""
        n, k = order.shape[1], self._k
        agree = (self._labels[order] == labels.unsqueeze(1)).double()
        place = torch.arange(1, n, dtype=torch.float64)
        steps = (agree[:, :-1] - agree[:, 1:]) / k * place.clamp(max=k) / place
        # The printed recursion starts from agree / n, which holds only where n >= k.
        last = agree[:, -1:] * min(k, n) / (k * n)
        values = torch.cat([steps, last], 1).flip(1).cumsum(1).flip(1)
        return torch.zeros_like(values).scatter_(1, order, values)


def _pair(features: Any, labels: Any, whose: str, width: int | None = None) -> tuple[Tensor, Tensor]:
    features, labels = torch.as_tensor(features).detach().cpu(), torch.as_tensor(labels).cpu()
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels) or width not in (None, features.shape[1]):
        raise QueryError(
            f"the features of {whose} have shape {tuple(features.shape)} and the labels {tuple(labels.shape)}; they "
            f"must be [samples, {width or 'd'}] and [samples]"
        )
    if not bool(features.isfinite().all()):
        raise QueryError(f"features of {whose} are NaN or infinite; distances to them mean nothing")
    return features, labels
