"""The linear datamodelling score: whether summed scores predict retraining on subsets (Park et al. 2023, 2.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logix_like.errors import EvaluationError
from logix_like.evaluation.scored import Scores, require_oracle, score_matrix
from logix_like.evaluation.statistics import bootstrapped, correlation, interval, ranks, spearman
from logix_like.layout import DataId
from logix_like.retraining import Measurements, SubsetOracle
from logix_like.subsets import random_subsets, size_of, whole_number

FEWEST_SUBSETS = 3


def subset_truth(oracle: SubsetOracle, *, subsets: int = 100, share: float = 0.5, seed: int = 0) -> Measurements:
    """Train on ``subsets`` random subsets, each ``share`` of the samples, and measure: what scores are held against.

    Each estimator of the same problem is then compared with the same truth. Retrainings that fail are left out with a
    warning; with a cache in the oracle an interrupted call goes on where it was.

    Raises:
        EvaluationError: a subset would hold no sample or all, there are fewer than 3, or the oracle is none.
        RetrainingError: all retrainings failed.
    """
    require_oracle(oracle)
    if whole_number(subsets, "subsets") < FEWEST_SUBSETS:
        raise EvaluationError(f"subsets is {subsets}; a rank correlation needs at least {FEWEST_SUBSETS}")
    size = size_of(share, oracle.n)
    if not 0 < size < oracle.n:
        raise EvaluationError(f"share is {share}: subsets of {size} of {oracle.n} samples cannot be compared")
    masks = random_subsets(oracle.n, size, subsets, torch.Generator().manual_seed(seed))
    return oracle.measurements(masks).complete()


@dataclass(frozen=True, eq=False)
class LDS:
    """How well scores predict retraining: rank correlation over subsets, mean over queries."""

    value: float
    """The mean: 1 for a perfect order of the subsets, 0 for none, below 0 for a wrong sign."""
    interval: tuple[float, float]
    """Of the mean, by resampling queries and subsets together: rather too wide than too narrow."""
    level: float
    """Of the interval, e.g. 0.95."""
    per_query: Tensor
    """``[queries]``."""
    ceiling: float
    """What the true expected outputs would reach, given the noise of retraining; NaN with fewer than 2 seeds."""
    subsets: int

    def __str__(self) -> str:
        """``LDS 0.512 [0.470, 0.553] over 100 queries and 100 subsets (ceiling 0.93)``."""
        ceiling = "" if math.isnan(self.ceiling) else f" (ceiling {self.ceiling:.2f})"
        low, high = self.interval
        return (
            f"LDS {self.value:.3f} [{low:.3f}, {high:.3f}] over {len(self.per_query)} queries and {self.subsets} "
            f"subsets{ceiling}"
        )


def lds(
    scores: Scores,
    truth: Measurements,
    *,
    queries: Any = None,
    data_id: Sequence[DataId] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> LDS:
    """Spearman's correlation between the sum of a subset's scores and what was measured after training on it.

    Args:
        scores: ``[queries, samples]``, an :class:`~logix_like.InfluenceResult` with all scores, or an estimator.
        truth: From :func:`subset_truth`; queries in the same order.
        queries: What an estimator is asked with.
        data_id: Names of the truth's samples 0, 1, ... where scores carry names; else numbers are expected.
        level: Of the interval.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: the scores do not fit the truth, which has failed retrainings or fewer than 3 subsets.
    """
    if not isinstance(truth, Measurements):
        raise EvaluationError(f"the truth is a {type(truth).__name__}; give what subset_truth(oracle) returns")
    measured = truth.means
    if not bool(measured.isfinite().all()):
        raise EvaluationError(
            f"{int((~measured.isfinite()).any(1).sum())} of the truth's {len(measured)} subsets have no measurement; "
            "leave them out by truth.complete()"
        )
    if len(measured) < FEWEST_SUBSETS:
        raise EvaluationError(f"the truth has {len(measured)} subsets; a rank correlation needs at least 3")
    matrix = score_matrix(scores, truth.masks.shape[1], measured.shape[1], queries, data_id)
    predicted, observed = ranks(truth.masks.double() @ matrix.T), ranks(measured)
    per_query = correlation(predicted, observed)
    generator = torch.Generator().manual_seed(seed)
    return LDS(
        value=per_query.mean().item(),
        interval=interval(bootstrapped(predicted, observed, generator), level),
        level=level,
        per_query=per_query,
        ceiling=noise_ceiling(truth),
        subsets=len(measured),
    )


def noise_ceiling(truth: Measurements) -> float:
    """The LDS of the outputs' true means, estimated from how well halves of the seeds agree; NaN with one seed.

    With ``r`` the correlation of two halves, the mean of all seeds has the reliability ``2 r / (1 + r)``
    (Spearman-Brown), and its correlation with what it estimates is the root of that.
    """
    seeds = truth.values.shape[1]
    if seeds < 2:
        return math.nan
    half = seeds // 2
    agreement = torch.stack(
        [
            spearman(rolled[:, :half].mean(1), rolled[:, half : 2 * half].mean(1))
            for rolled in (truth.values.roll(shift, 1) for shift in range(seeds))
        ]
    ).mean(0)
    # Halves of `half` seeds each; the truth is the mean of `seeds`. Halves that disagree have nothing in common.
    ratio, agreement = seeds / half, agreement.clamp(0, 1)
    return (ratio * agreement / (1 + (ratio - 1) * agreement)).sqrt().mean().item()
