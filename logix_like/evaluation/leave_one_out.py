"""Scores against what leaving single samples out really does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logix_like.errors import EvaluationError
from logix_like.evaluation.scored import Scores, require_oracle, score_matrix
from logix_like.evaluation.statistics import bootstrapped, correlation, interval, ranks
from logix_like.layout import DataId
from logix_like.retraining import SubsetOracle
from logix_like.subsets import whole_number, without_each


@dataclass(frozen=True, eq=False)
class Correlation:
    """How well scores agree with true differences, over samples; means over queries."""

    pearson: float
    spearman: float
    interval: tuple[float, float]
    """Of Spearman's, by resampling queries and samples together; 95 %."""
    per_query: Tensor
    """``[queries]``: Spearman's."""
    differences: Tensor
    """``[queries, samples left out]``: measured with all samples less measured without one."""

    def __str__(self) -> str:
        """Both means and the interval in a line."""
        low, high = self.interval
        return (
            f"leave-one-out: Spearman {self.spearman:.3f} [{low:.3f}, {high:.3f}], Pearson {self.pearson:.3f} over "
            f"{self.differences.shape[1]} samples and {len(self.per_query)} queries"
        )


def leave_one_out_correlation(
    oracle: SubsetOracle,
    scores: Scores,
    *,
    samples: Sequence[int] | None = None,
    queries: Any = None,
    data_id: Sequence[DataId] | None = None,
) -> Correlation:
    """Correlate scores with ``v(N) - v(N without i)`` over samples.

    Where training is random the true differences are mostly noise unless the oracle averages many seeds; LDS asks the
    same of larger groups.

    Args:
        oracle: Trains and measures.
        scores: As in :func:`~logix_like.evaluation.lds`.
        samples: Indices of the samples to leave out; all unless given.
        queries: What an estimator is asked with.
        data_id: Names of the samples 0, 1, ... where scores carry names.

    Raises:
        EvaluationError: the scores do not fit, or fewer than 3 samples are to be left out.
    """
    require_oracle(oracle)
    given = range(oracle.n) if samples is None else samples
    if not isinstance(given, Iterable):
        raise EvaluationError(f"samples to be left out are {given!r}; give a sequence of indices")
    chosen = [whole_number(one, "a sample to leave out") for one in given]
    if len(set(chosen) & set(range(oracle.n))) < max(3, len(chosen)):
        raise EvaluationError(
            f"samples to be left out are {chosen[:10]}; a correlation needs at least 3 different ones, from 0 to "
            f"{oracle.n - 1}"
        )
    matrix = score_matrix(scores, oracle.n, oracle.queries, queries, data_id)[:, chosen].T
    differences = oracle.full() - oracle.values(without_each(oracle.n)[chosen])
    predicted, observed = ranks(matrix), ranks(differences)
    per_query = correlation(predicted, observed)
    draws = bootstrapped(predicted, observed, torch.Generator().manual_seed(0))
    return Correlation(
        pearson=correlation(matrix, differences).mean().item(),
        spearman=per_query.mean().item(),
        interval=interval(draws, 0.95),
        per_query=per_query,
        differences=differences.T,
    )
