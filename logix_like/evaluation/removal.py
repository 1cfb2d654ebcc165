"""What happens to queries when the samples said to matter most are removed, beside removing others."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logix_like.errors import EvaluationError
from logix_like.evaluation.scored import Scores, require_oracle, score_matrix, score_vector
from logix_like.evaluation.statistics import mean_and_error
from logix_like.layout import DataId
from logix_like.query.ranking import stable_top
from logix_like.retraining import SubsetOracle
from logix_like.subsets import random_subsets, size_of


@dataclass(frozen=True, eq=False)
class RemovalEffect:
    """Loss of each query's measured quantity after removing its own top proponents, beside random removal."""

    removed: tuple[int, ...]
    """How many samples were removed."""
    drops: Tensor
    """``[removed, queries]``: measured with all samples less measured without the top proponents; above 0: worse."""
    random: Tensor
    """``[removed, queries]``: the same for random samples, mean over draws."""
    flipped: Tensor
    """``[removed]``: share of the queries measured above 0 before (right, if it is a margin) and not after;
    NaN if none was."""
    flipped_random: Tensor
    """``[removed]``: the same for random samples."""

    @property
    def differences(self) -> Tensor:
        """``[removed, queries]``: how much worse than random removal; above 0 for scores that are right."""
        return self.drops - self.random

    def __str__(self) -> str:
        """A table with a line for each number removed."""
        lines = [f"{'removed':>8} {'drop':>18} {'random':>10} {'flipped':>8} {'random':>8}"]
        for i, count in enumerate(self.removed):
            lines.append(
                f"{count:>8} {mean_and_error(self.drops[i]):>18} {self.random[i].mean():>+10.4f} "
                f"{_percent(self.flipped[i]):>8} {_percent(self.flipped_random[i]):>8}"
            )
        return "\n".join(lines)


def _percent(share: Tensor) -> str:
    return "-" if bool(share.isnan()) else f"{share.item():.1%}"


def brittleness(
    oracle: SubsetOracle,
    scores: Scores,
    *,
    removed: Sequence[int] = (10, 20, 40, 80),
    draws: int = 5,
    seed: int = 0,
    queries: Any = None,
    data_id: Sequence[DataId] | None = None,
) -> RemovalEffect:
    """Remove each query's top proponents, retrain, and see how often its answer flips (Ilyas et al. 2022, sect. 4).

    ``queries x len(removed)`` retrainings, and ``draws`` for each number removed at random. Measure a margin for the
    flips to mean that a prediction changed.

    Args:
        oracle: Trains and measures.
        scores: As in :func:`~logix_like.evaluation.lds`.
        removed: How many samples are removed.
        draws: Random removals of each size.
        seed: Of these.
        queries: What an estimator is asked with.
        data_id: Names of the samples 0, 1, ... where scores carry names.

    Raises:
        EvaluationError: the scores do not fit, a number to remove leaves no sample, or nothing is drawn.
        RetrainingError: a retraining failed.
    """
    require_oracle(oracle)
    try:
        counts = tuple(map(operator.index, removed))
    except TypeError as error:
        raise EvaluationError(f"removed is {removed!r}; give a sequence of whole numbers") from error
    _require_draws(draws)  # before anything is trained
    if not counts or not all(0 < count < oracle.n for count in counts):
        raise EvaluationError(f"removed is {counts}; each number must be between 1 and {oracle.n - 1}, of {oracle.n}")
    matrix = score_matrix(scores, oracle.n, oracle.queries, queries, data_id)
    own, randomly = with_random_removals(oracle, _masks(matrix, counts).flatten(0, 1), counts, draws, seed)
    after = own.view(len(counts), len(matrix), -1).diagonal(dim1=1, dim2=2)
    everything = oracle.full()
    right = everything > 0
    flips = (after <= 0).double()[:, right].mean(1), (randomly <= 0).double()[:, :, right].mean((1, 2))
    return RemovalEffect(counts, everything - after, everything - randomly.mean(1), *flips)


def _masks(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """``[counts, queries, n]``: all samples but each query's highest."""
    _, order = stable_top(scores, max(counts))
    masks = torch.ones(len(counts), *scores.shape, dtype=torch.bool)
    for mask, count in zip(masks, counts, strict=True):
        mask.scatter_(1, order[:, :count], False)
    return masks


def with_random_removals(
    oracle: SubsetOracle, chosen: Tensor, counts: Sequence[int], draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Measured on the subsets ``chosen [m, n]``, and ``[counts, draws, queries]`` without so many random samples.

    Raises:
        EvaluationError: nothing is drawn.
        RetrainingError: a retraining failed.
    """
    _require_draws(draws)
    generator = torch.Generator().manual_seed(seed)
    others = [~random_subsets(oracle.n, count, draws, generator) for count in counts]
    measured = oracle.values(torch.cat([chosen, *others]))  # at once, so that none waits for another
    return measured[: len(chosen)], measured[len(chosen) :].view(len(counts), draws, -1)


def _require_draws(draws: int) -> None:
    if draws < 1:
        raise EvaluationError(f"draws is {draws}; at least 1 random removal is needed to compare with")


def query_loss_difference(
    oracle: SubsetOracle, scores: Scores, *, share: float = 0.01, **options: Any
) -> RemovalEffect:
    """Remove the top ``share`` (1 %) of each query's proponents against as many at random: how much worse it gets.

    ``differences`` of the result is the figure; measure minus the loss. Options are those of :func:`brittleness`.

    Raises:
        EvaluationError: ``share`` is none between 0 and 1.
    """
    require_oracle(oracle)
    if not 0 < share < 1:
        raise EvaluationError(f"share is {share}; it must be above 0 and below 1, e.g. 0.01")
    return brittleness(oracle, scores, removed=(max(1, size_of(share, oracle.n)),), **options)


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """What is measured as a growing share of the samples is removed."""

    shares: tuple[float, ...]
    """Of the samples, removed."""
    highest_first: Tensor
    """``[shares, queries]``: measured without the samples of the highest values."""
    lowest_first: Tensor
    """``[shares, queries]``: without those of the lowest."""
    random: Tensor
    """``[shares, draws, queries]``: without random ones."""

    def __str__(self) -> str:
        """A table of means over the queries; the error is that over the draws."""
        lines = [f"{'removed':>8} {'highest first':>14} {'lowest first':>14} {'at random':>22}"]
        for i, share in enumerate(self.shares):
            lines.append(
                f"{share:>8.1%} {self.highest_first[i].mean():>14.4f} {self.lowest_first[i].mean():>14.4f} "
                f"{mean_and_error(self.random[i].mean(1)):>22}"
            )
        return "\n".join(lines)


def removal_curve(
    oracle: SubsetOracle,
    values: Scores,
    *,
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
    draws: int = 5,
    seed: int = 0,
    data_id: Sequence[DataId] | None = None,
) -> RemovalCurve:
    """Remove samples by one ranking, the highest or the lowest first, or at random, and retrain.

    For values that are right the first curve falls fastest, and the second falls last or rises (Ghorbani and Zou 2019,
    section 4). ``2 + draws`` retrainings for each share.

    Args:
        oracle: Trains and measures.
        values: ``[samples]``, e.g. Shapley values or scores summed over a validation set.
        shares: Of the samples, removed.
        draws: Random removals for each share.
        seed: Of these.
        data_id: Names of the samples 0, 1, ... where values carry names.

    Raises:
        EvaluationError: the values do not fit, a share leaves no sample or removes none, or nothing is drawn.
        RetrainingError: a retraining failed.
    """
    require_oracle(oracle)
    vector, n = score_vector(values, oracle.n, data_id), oracle.n
    try:
        removed = tuple(float(share) for share in shares)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"shares are {shares!r}; give a sequence of numbers between 0 and 1") from error
    counts = [size_of(share, n) for share in removed]
    if not counts or not all(0 < count < n for count in counts):
        raise EvaluationError(f"shares are {removed} of {n} samples; each must remove some and leave some")
    chosen = torch.cat([_masks(ranked[None], counts)[:, 0] for ranked in (vector, -vector)])
    own, randomly = with_random_removals(oracle, chosen, counts, draws, seed)
    return RemovalCurve(removed, own[: len(counts)], own[len(counts) :], randomly)
