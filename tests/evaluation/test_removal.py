"""Removing samples from an additive world, in which every drop is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from logix_like.errors import EvaluationError, RetrainingError
from logix_like.evaluation import (
    brittleness,
    label_errors,
    leave_one_out_correlation,
    query_loss_difference,
    removal_curve,
)
from logix_like.query.result import InfluenceResult
from logix_like.workflows import curate
from tests.evaluation.additive import Additive

EXACT = 1e-9


def test_brittleness_removes_each_querys_own_proponents() -> None:
    world = Additive(q=5)
    found = brittleness(world.oracle, world.effects, removed=(3, 10), draws=200)
    for line, count in enumerate((3, 10)):
        expected = world.effects.topk(count, dim=1).values.sum(1)
        torch.testing.assert_close(found.drops[line], expected, rtol=EXACT, atol=EXACT)
        chance = world.effects.mean(1) * count
        spread = 5 * world.effects.std(1) * count**0.5 / 200**0.5
        assert ((found.random[line] - chance).abs() < spread).all()
        right = world.effects.sum(1) > 0
        flipped = (world.effects.sum(1) - expected <= 0)[right].double().mean()
        assert found.flipped[line] == pytest.approx(flipped.item())
    assert torch.equal(found.differences, found.drops - found.random)
    assert (found.flipped > found.flipped_random).all()
    assert str(found).count("\n") == 2


def test_no_other_choice_of_samples_drops_a_query_further() -> None:
    world = Additive(q=5)
    best = brittleness(world.oracle, world.effects, removed=(4,)).drops
    other = brittleness(world.oracle, world.effects + torch.randn(5, 60), removed=(4,)).drops
    assert (best > other).all()


def test_query_loss_difference_removes_a_share() -> None:
    world = Additive(q=5)
    found = query_loss_difference(world.oracle, world.effects, share=0.05)
    assert found.removed == (3,)
    assert (found.differences > 0).all()
    assert query_loss_difference(world.oracle, world.effects, share=0.0001).removed == (1,)


def test_a_removal_curve_in_an_additive_world() -> None:
    world = Additive(q=1)
    values = world.effects[0]
    found = removal_curve(world.oracle, values, shares=(0.1, 0.5), draws=300)
    total = values.sum()
    expected = [(total - values.topk(count).values.sum()).item() for count in (6, 30)]
    assert found.highest_first[:, 0].tolist() == pytest.approx(expected)
    expected = [(total - values.topk(count, largest=False).values.sum()).item() for count in (6, 30)]
    assert found.lowest_first[:, 0].tolist() == pytest.approx(expected)
    for line, count in enumerate((6, 30)):
        spread = 5 * values.std().item() * count**0.5 / 300**0.5
        assert found.random[line].mean().item() == pytest.approx((total - values.mean() * count).item(), abs=spread)
    assert str(found).count("\n") == 2


def test_leave_one_out_correlation() -> None:
    world = Additive(q=5)
    found = leave_one_out_correlation(world.oracle, world.effects)
    assert found.pearson == pytest.approx(1)
    assert found.spearman == pytest.approx(1)
    torch.testing.assert_close(found.differences, world.effects, rtol=EXACT, atol=EXACT)
    found = leave_one_out_correlation(world.oracle, -world.effects, samples=[4, 9, 30, 2])
    assert found.spearman == pytest.approx(-1)
    assert found.differences.shape == (5, 4)
    assert "over 4 samples and 5 queries" in str(found)


def test_the_interval_of_one_query_is_no_point() -> None:
    """It tells how sure the figure is given so few samples left out, however few queries there are."""
    world = Additive(q=1)
    scores = world.effects + torch.randn(1, 60, generator=torch.Generator().manual_seed(2))
    few, all_of_them = (
        leave_one_out_correlation(world.oracle, scores, samples=samples) for samples in (torch.arange(10), None)
    )
    for found in (few, all_of_them):
        low, high = found.interval
        assert low < found.spearman < high
    assert few.interval[1] - few.interval[0] > all_of_them.interval[1] - all_of_them.interval[0] > 0.05


def test_what_is_refused() -> None:
    world = Additive(q=2)
    with pytest.raises(EvaluationError, match="between 1 and 59"):
        brittleness(world.oracle, world.effects, removed=(60,))
    for removed in ((1.5,), 5):
        with pytest.raises(EvaluationError, match="give a sequence of whole numbers"):
            brittleness(world.oracle, world.effects, removed=removed)
    with pytest.raises(EvaluationError, match=r"shape \(2, 59\)"):
        brittleness(world.oracle, world.effects[:, 1:], removed=(5,))
    with pytest.raises(EvaluationError, match="must remove some and leave some"):
        removal_curve(world.oracle, world.effects[0], shares=(1.0,))
    with pytest.raises(EvaluationError, match="must remove some and leave some"):
        removal_curve(world.oracle, world.effects[0], shares=(math.nan,))
    with pytest.raises(EvaluationError, match=r"\(60,\) is needed"):
        removal_curve(world.oracle, world.effects)
    for shares in ("ab", 0.1, [None]):
        with pytest.raises(EvaluationError, match="give a sequence of numbers between 0 and 1"):
            removal_curve(world.oracle, world.effects[0], shares=shares)
    with pytest.raises(EvaluationError, match="samples to be left out are 3; give a sequence"):
        leave_one_out_correlation(world.oracle, world.effects, samples=3)
    with pytest.raises(EvaluationError, match="at least 3"):
        leave_one_out_correlation(world.oracle, world.effects, samples=[1, 2])
    with pytest.raises(RetrainingError, match=r"a sample to leave out is tensor\(0\.\); it must be a whole number"):
        leave_one_out_correlation(world.oracle, world.effects, samples=torch.tensor([0.0, 1.0, 2.0]))
    for samples in ([1, 1, 1, 1], [58, 59, 60]):
        with pytest.raises(EvaluationError, match="at least 3 different ones, from 0 to 59"):
            leave_one_out_correlation(world.oracle, world.effects, samples=samples)


def test_one_query_and_one_draw_print_without_an_error_bar() -> None:
    world = Additive(q=1)
    for shown in (
        str(brittleness(world.oracle, world.effects, removed=(3,))),
        str(removal_curve(world.oracle, world.effects[0], shares=(0.1,), draws=1)),
        str(curate(world.oracle, world.effects[0], draws=1)),
    ):
        assert "nan" not in shown and "+-" not in shown
    assert "+-" in str(curate(world.oracle, world.effects[0], draws=2))


def test_options_that_make_no_sense() -> None:
    world = Additive(q=2)
    for draws in (0, -1):
        with pytest.raises(EvaluationError, match=f"draws is {draws}; at least 1 random removal"):
            brittleness(world.oracle, world.effects, removed=(5,), draws=draws)
        with pytest.raises(EvaluationError, match=f"draws is {draws}; at least 1 random removal"):
            removal_curve(world.oracle, world.effects[0], draws=draws)
    for share in (0.0, -0.5, 1.5):
        with pytest.raises(EvaluationError, match=r"share is .*; it must be above 0"):
            query_loss_difference(world.oracle, world.effects, share=share)


@pytest.mark.parametrize("evaluate", [brittleness, query_loss_difference, leave_one_out_correlation, removal_curve])
def test_scores_before_the_oracle_are_said_to_be_none(evaluate: Callable[..., object]) -> None:
    """As lds takes them."""
    world = Additive(q=2)
    with pytest.raises(EvaluationError, match="the oracle is a Tensor; give the SubsetOracle"):
        evaluate(world.effects, world.oracle)


def test_shares_may_be_a_tensor() -> None:
    world = Additive(q=1)
    found, expected = (
        removal_curve(world.oracle, world.effects[0], shares=s) for s in (torch.tensor([0.25, 0.5]), (0.25, 0.5))
    )
    assert str(found) == str(expected)


def test_a_results_scores_are_summed_over_its_queries_by_name() -> None:
    world = Additive(q=2)
    order = torch.randperm(60)
    ids = np.array([f"s{i}" for i in order.tolist()], dtype=object)
    result = InfluenceResult(
        ("a", "b"), 60, "dot", "x", 0.1, "mean", "exact", "", data_id=ids, scores=world.effects[:, order]
    )
    found = curate(world.oracle, result, data_id=[f"s{i}" for i in range(60)])
    assert found.dropped == curate(world.oracle, world.effects.sum(0)).dropped
    harmful = torch.zeros(60, dtype=torch.bool).index_fill_(0, torch.tensor(found.dropped), True)
    assert label_errors(result, harmful, data_id=[f"s{i}" for i in range(60)]).auroc == 1
