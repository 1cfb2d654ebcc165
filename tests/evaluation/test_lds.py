"""LDS where the truth is known: identities G1 and G2, the interval's coverage, and what is refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from logix_like.errors import EvaluationError, RetrainingError
from logix_like.estimators.knn_shapley import KNNShapley
from logix_like.estimators.leave_one_out import LeaveOneOut
from logix_like.evaluation import lds, subset_truth
from logix_like.evaluation.lds import noise_ceiling
from logix_like.evaluation.statistics import correlation, ranks, resampled, spearman
from logix_like.query.result import InfluenceResult
from logix_like.retraining import Measurements, SubsetOracle
from tests.evaluation.additive import Additive


def test_g1_true_scores_reach_1_and_their_opposite_minus_1() -> None:
    world = Additive()
    truth = subset_truth(world.oracle, subsets=50)
    assert (truth.masks.sum(1) == 30).all()
    found = lds(world.effects, truth)
    assert found.value == pytest.approx(1)
    assert found.interval == pytest.approx((1, 1))
    assert math.isnan(found.ceiling)
    assert lds(-world.effects, truth).value == pytest.approx(-1)
    # A query's scores may be scaled and shifted: nothing but the order of subsets of one size counts.
    assert lds(3 * world.effects + 1, truth).value == pytest.approx(1)


def test_an_estimator_s_result_is_as_good_as_its_scores() -> None:
    world = Additive()
    truth = subset_truth(world.oracle, subsets=20)
    result = LeaveOneOut(world.oracle).influence(None)
    assert lds(result, truth).value == pytest.approx(lds(LeaveOneOut(world.oracle), truth).value)


def test_g1_random_scores_tell_nothing() -> None:
    truth = subset_truth(Additive(q=200).oracle, subsets=50)
    found = lds(torch.randn(200, 60, generator=torch.Generator().manual_seed(5)), truth)
    # Queries and scores are independent, so that the mean over 200 is near 0.
    assert abs(found.value) < 4 * found.per_query.std().item() / 200**0.5
    assert 1 / 49**0.5 < found.per_query.std().item() < 0.25


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_g2_noise_of_retraining_sets_the_ceiling(noise: float) -> None:
    world = Additive(q=100, noise=noise, seeds=4)
    truth = subset_truth(world.oracle, subsets=100)
    expected = 1 / (1 + noise**2 / 4) ** 0.5  # the noise of a mean over 4 seeds
    found = lds(world.effects, truth)
    assert found.value == pytest.approx(expected, abs=0.03)
    assert found.ceiling == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_ceiling_with_few_seeds(seeds: int) -> None:
    truth = subset_truth(Additive(q=200, noise=1.0, seeds=seeds).oracle, subsets=100)
    assert noise_ceiling(truth) == pytest.approx(1 / (1 + 1 / seeds) ** 0.5, abs=0.03)


def test_seeds_that_disagree_have_no_ceiling() -> None:
    """Beyond a correlation of -2/3 the formula turns over, and would call contradiction certainty."""
    values = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))[:, :, :1].double()
    halves = [(values.roll(shift, 1)[:, :2].mean(1), values.roll(shift, 1)[:, 2:4].mean(1)) for shift in range(5)]
    assert torch.stack([spearman(*pair) for pair in halves]).mean() < -2 / 3
    assert noise_ceiling(Measurements(torch.ones(3, 4, dtype=torch.bool), values)) == 0


def test_the_interval_holds_the_expected_value_about_as_often_as_it_says() -> None:
    world, covered = Additive(q=30, noise=1.0), 0
    wrong = world.effects + 1.5 * torch.randn(30, 60, generator=torch.Generator().manual_seed(1))
    many = lds(wrong, subset_truth(world.oracle, subsets=500, seed=99)).value
    for seed in range(20):
        low, high = lds(wrong, subset_truth(world.oracle, subsets=40, seed=seed), level=0.9).interval
        covered += low <= many <= high
    assert covered >= 15  # of 20; queries are resampled too, so that it is rather too wide


def test_one_query_by_the_definition() -> None:
    world = Additive(q=1, noise=2.0)
    truth = subset_truth(world.oracle, subsets=30)
    sums = [world.effects[0, mask].sum().item() for mask in truth.masks]
    expected = spearmanr(sums, truth.means[:, 0].numpy()).statistic
    assert lds(world.effects, truth).value == pytest.approx(expected, abs=1e-12)


def test_an_estimator_or_a_result_may_be_given_in_any_order() -> None:
    world = Additive()
    truth = subset_truth(world.oracle, subsets=20)
    estimator = LeaveOneOut(world.oracle, data_id=[f"s{i}" for i in range(60)])
    names = [f"s{i}" for i in range(60)]
    assert lds(estimator, truth, data_id=names).value == pytest.approx(1)
    order = np.random.default_rng(0).permutation(60)
    result = _result(world.effects[:, torch.from_numpy(order)], np.array(order.tolist(), dtype=object))
    assert lds(result, truth).value == pytest.approx(1)
    with pytest.raises(EvaluationError, match=r"60 of the truth's 60 samples have no score \(first: 0, 1, 2"):
        lds(estimator, truth)
    with pytest.raises(EvaluationError, match="data_id names 3 samples"):
        lds(estimator, truth, data_id=names[:3])


def test_names_may_be_a_tensor_and_each_names_one_sample() -> None:
    world = Additive()
    truth = subset_truth(world.oracle, subsets=20)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    estimator = LeaveOneOut(world.oracle, data_id=order)
    assert lds(estimator, truth, data_id=order).value == pytest.approx(1)
    assert lds(estimator, truth, data_id=order.numpy()).value == pytest.approx(1)
    twice = _result(torch.cat([world.effects, world.effects[:, 3:5]], 1), np.array([*range(60), 3, 4], dtype=object))
    with pytest.raises(EvaluationError, match=r"2 scores bear the name of another sample \(first: 3\)"):
        lds(twice, truth)


def _result(scores: Tensor, ids: np.ndarray, reduce: str = "mean") -> InfluenceResult:
    queries = tuple(range(len(scores)))
    return InfluenceResult(queries, len(ids), "dot", "x", 0.1, reduce, "exact", "", data_id=ids, scores=scores)


def test_scores_that_do_not_fit_are_refused() -> None:
    world = Additive()
    truth = subset_truth(world.oracle, subsets=20)
    with pytest.raises(EvaluationError, match=r"shape \(20, 59\); \(20, 60\) is needed"):
        lds(world.effects[:, 1:], truth)
    with pytest.raises(EvaluationError, match=r"shape \(60, 20\)"):
        lds(world.effects.T, truth)
    with pytest.raises(EvaluationError, match="1 of 1200 scores are NaN"):
        lds(world.effects.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan).double()), truth)
    with pytest.raises(EvaluationError, match="scores visits"):
        lds(_result(world.effects, np.arange(60).astype(object), "none"), truth)
    with pytest.raises(EvaluationError, match="2 subsets"):
        lds(world.effects, Measurements(truth.masks[:2], truth.values[:2]))
    with pytest.raises(EvaluationError, match="share is 1"):
        subset_truth(world.oracle, share=1.0)
    with pytest.raises(EvaluationError, match="share is nan"):
        subset_truth(world.oracle, share=math.nan)
    with pytest.raises(EvaluationError, match="subsets is 0; a rank correlation needs at least 3"):
        subset_truth(world.oracle, subsets=0)
    with pytest.raises(EvaluationError, match="complex numbers"):
        lds(torch.complex(world.effects, world.effects), truth)
    broken = truth.values.clone().index_fill_(0, torch.tensor([4]), math.nan)
    with pytest.raises(EvaluationError, match=r"1 of the truth's 20 subsets have no measurement"):
        lds(world.effects, Measurements(truth.masks, broken))
    with pytest.warns(RuntimeWarning, match="1 of 20 subsets are left out$"):
        assert lds(world.effects, Measurements(truth.masks, broken).complete()).subsets == 19
    with pytest.raises(EvaluationError, match=r"data_id names 1 samples \(60 names\)"):
        lds(_result(world.effects, np.arange(60).astype(object)), truth, data_id=[0] * 60)
    with pytest.raises(EvaluationError, match=r"the truth is a SubsetOracle; give what subset_truth\(oracle\) returns"):
        lds(world.effects, world.oracle)
    with pytest.raises(EvaluationError, match=r"the oracle is a Measurements; give the SubsetOracle"):
        subset_truth(truth)
    with pytest.raises(EvaluationError, match=r"kNN-Shapley cannot answer without queries .*give queries="):
        lds(KNNShapley(torch.randn(60, 2), torch.zeros(60)), truth)
    with pytest.raises(RetrainingError, match=r"subsets is 4\.5; it must be a whole number"):
        subset_truth(world.oracle, subsets=4.5)
    with pytest.raises(EvaluationError, match="level is 95"):
        lds(world.effects, truth, level=95)


def test_a_subset_that_fails_is_left_out_and_the_rest_goes_on_later(tmp_path: Path) -> None:
    trained = []

    def train(samples: list[int], seed: int) -> int:
        trained.append(samples)
        if 0 in samples and 1 not in samples and 2 not in samples:
            raise ValueError("a class is missing")
        return len(trained)

    oracle = SubsetOracle(train, lambda model: torch.tensor([float(model)]), 6, cache=tmp_path)
    with pytest.warns(RuntimeWarning, match=r"\d+ of 40 subsets are left out: training on 3 .*a class is missing"):
        truth = subset_truth(oracle, subsets=40)
    assert not (truth.masks[:, 0] & ~truth.masks[:, 1] & ~truth.masks[:, 2]).any()
    assert lds(torch.randn(1, 6), truth).subsets == len(truth.masks) < 40
    before = len(trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subset_truth(oracle, subsets=40)
    assert all(0 in samples and 1 not in samples for samples in trained[before:])  # only the failures are tried again


def test_correlations_are_scipys_and_a_constant_has_none() -> None:
    a, b = torch.randn(15, 3, dtype=torch.float64), torch.randn(15, 3, dtype=torch.float64).round()
    for column, found in enumerate(spearman(a, b).tolist()):
        assert found == pytest.approx(spearmanr(a[:, column].numpy(), b[:, column].numpy()).statistic, abs=1e-12)
    assert correlation(a, torch.ones_like(a) * 1e9).tolist() == [0, 0, 0]
    assert ranks(torch.tensor([2.0, 1.0, 2.0])).tolist() == [2.5, 1, 2.5]
    weights = resampled(15, 4, torch.Generator().manual_seed(0))
    assert weights.sum(1).tolist() == [15] * 4
    repeated = torch.repeat_interleave(torch.arange(15), weights[2].long())
    torch.testing.assert_close(correlation(a, b, weights)[2], correlation(a[repeated], b[repeated]))


def test_it_prints_as_a_line() -> None:
    found = lds(Additive().effects, subset_truth(Additive(seeds=2).oracle, subsets=10))
    assert str(found) == "LDS 1.000 [1.000, 1.000] over 20 queries and 10 subsets (ceiling 1.00)"
