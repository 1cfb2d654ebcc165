"""What the estimators that retrain have in common: one oracle, whose measured quantities are the queries."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logix_like.errors import QueryError, RetrainingError
from logix_like.estimators.base import Estimator
from logix_like.ids import as_data_ids
from logix_like.layout import DataId
from logix_like.query.result import Ids
from logix_like.retraining import SubsetOracle
from logix_like.subsets import all_subsets

SHOWN = 10
"""Of the indices that are refused."""


class RetrainedEstimator(Estimator):
    """Values samples by what models trained with and without them are measured to do.

    A query is the index of a measured quantity. All retrainings are done at the first question and kept.

    Args:
        oracle: Trains and measures.
        data_id: The samples' names, 0, 1, ... unless given.
        own: ``[samples]``: for each sample the index of the quantity that is its own output; self-influence
            (Feldman and Zhang's memorisation) needs it.
    """

    def __init__(
        self, oracle: SubsetOracle, *, data_id: Sequence[DataId] | None = None, own: Sequence[int] | None = None
    ) -> None:
        self._oracle = oracle
        self._ids = _ids(range(oracle.n) if data_id is None else data_id, oracle.n)
        self._own = own
        self._values: Tensor | None = None

    @property
    def data_id(self) -> Ids:
        """The samples' names."""
        return self._ids

    def scores(self, queries: Sequence[int] | None = None) -> Tensor:
        """``[queries, samples]`` float64 for the measured quantities with these indices; None for all.

        Raises:
            QueryError: there is no quantity with such an index.
            RetrainingError: a retraining failed.
        """
        values = self.values
        return values.clone() if queries is None else values[_indices(queries, len(values), "queries")]

    def self_influence(self) -> Tensor:
        """``[samples]``: each sample's score for its own output, which ``own`` names.

        Raises:
            QueryError: ``own`` was not given, or names other than one measured quantity for each sample.
        """
        if self._own is None:
            raise QueryError(
                "self-influence needs the samples' own outputs among what is measured: measure them, and give own=, "
                "their indices"
            )
        own = _indices(self._own, len(self.values), "own")
        if len(own) != self._oracle.n:
            raise QueryError(
                f"own names {len(own)} quantities; it must name one of the {len(self.values)} measured for each of "
                f"{self._oracle.n} samples"
            )
        return self.values[own, torch.arange(len(own))]

    @property
    def values(self) -> Tensor:
        """``[all queries, samples]`` float64."""
        if self._values is None:
            self._values = self._estimate()
        return self._values

    @abstractmethod
    def _estimate(self) -> Tensor:
        """``[all queries, samples]``; called once."""


class SampledSubsets(RetrainedEstimator):
    """Values samples by the mean over subsets with them less that over subsets without them.

    Drawn subsets of which a retraining fails are left out with a warning; of all there are, each is needed.

    Args:
        oracle: Trains and measures.
        subsets: How many are drawn; None takes all there are, of at most 12 samples.
        seed: Of the draw.
        data_id: The samples' names, 0, 1, ... unless given.
        own: Index of the measured quantity that is each sample's own output.
    """

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
        if self._subsets is None:
            masks = self._among(all_subsets(self._oracle.n))
            return difference_of_means(masks, self._oracle.values(masks))[0]
        masks = self._drawn(self._subsets, torch.Generator().manual_seed(self._seed))
        found = self._oracle.measurements(masks).complete()
        differences, self._errors = difference_of_means(found.masks, found.means)
        return differences

    @abstractmethod
    def _among(self, masks: Tensor) -> Tensor:
        """Those of all subsets ``[2^n, n]`` that the values are defined over."""

    @abstractmethod
    def _drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count, n]`` random ones of them."""


def difference_of_means(masks: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of ``values [subsets, queries]`` over subsets with a sample less that over those without it.

    ``masks`` is ``[subsets, n]``. Returns the differences and their standard errors, ``[queries, n]``; the error is
    NaN where fewer than two subsets are on a side.

    Raises:
        RetrainingError: a sample is in every subset or in none.
    """
    inside = masks.to(values.dtype)
    counts = torch.stack([inside.sum(0), (1 - inside).sum(0)])
    if not bool((counts > 0).all()):
        sample = int((counts.min(0).values == 0).nonzero()[0])
        raise RetrainingError(
            f"sample {sample} is in all or in none of the {len(masks)} subsets, so that nothing is known of it; draw "
            "more subsets"
        )
    centred = values - values.mean(0)  # so that squares lose no digits
    sums = torch.stack([centred.T @ inside, centred.T @ (1 - inside)])
    squares = torch.stack([centred.square().T @ inside, centred.square().T @ (1 - inside)])
    means = sums / counts.unsqueeze(1)
    # Of one subset the variance is 0 / 0: unknown.
    variances = (squares / counts.unsqueeze(1) - means.square()).clamp_min(0) / (counts - 1).unsqueeze(1)
    variances = torch.where((counts > 1).unsqueeze(1), variances, torch.nan)
    return means[0] - means[1], variances.sum(0).sqrt()


def _indices(given: Iterable[Any], count: int, what: str) -> list[int]:
    """Whole numbers below ``count``; a mask would count as the indices 0 and 1."""
    try:
        listed = torch.as_tensor(given).tolist() if isinstance(given, Tensor | np.ndarray) else list(given)
        found = [operator.index(one) for one in listed]
    except TypeError as error:
        raise QueryError(f"{what} is {given!r}; give a sequence of indices of what is measured") from error
    if any(isinstance(one, bool) for one in listed) or any(not 0 <= one < count for one in found):
        raise QueryError(
            f"{what} is {listed[:SHOWN]}; what is measured has the indices 0 to {count - 1}, and a mask names none"
        )
    return found


def _ids(data_id: Sequence[DataId] | range, n: int) -> Ids:
    names = as_data_ids(data_id)
    if len(names) != n:
        raise QueryError(f"data_id names {len(names)} samples; the oracle trains on {n}")
    array = np.empty(n, dtype=object)
    array[:] = names
    return array
