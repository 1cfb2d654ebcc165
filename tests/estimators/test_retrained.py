"""Identities C1 to C10: the estimators that retrain against enumeration."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from logix_like.errors import QueryError, RetrainingError
from logix_like.estimators.banzhaf import Banzhaf
from logix_like.estimators.downsampling import Downsampling
from logix_like.estimators.knn_shapley import KNNShapley
from logix_like.estimators.leave_one_out import LeaveOneOut
from logix_like.estimators.retrained import RetrainedEstimator
from logix_like.estimators.shapley import ExactShapley, Shapley
from logix_like.retraining import SubsetOracle
from tests.games import PENALTY, Ridge, downsampling, shapley

EXACT = 1e-12
"""Sums in another order, nothing else."""
FULL = tuple(range(8))


@pytest.fixture
def ridge() -> Ridge:
    return Ridge()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_a1_leave_one_out_of_ridge_in_closed_form(ridge: Ridge) -> None:
    """What is lost without a sample follows from its error and its leverage (Cook)."""
    inverse = torch.linalg.inv(ridge.x.T @ ridge.x + PENALTY * torch.eye(3, dtype=torch.float64))
    weights = inverse @ ridge.x.T @ ridge.y
    leverage = ((ridge.x @ inverse) * ridge.x).sum(1)
    errors = ridge.x @ weights - ridge.y
    without = weights + (errors / (1 - leverage)).unsqueeze(1) * (ridge.x @ inverse)
    expected = torch.stack([ridge.measure(weights) - ridge.measure(w) for w in without], 1)
    close(LeaveOneOut(ridge.oracle()).scores(), expected)


def test_c1_c2_shapley_by_subsets_and_by_all_permutations(ridge: Ridge) -> None:
    found = ExactShapley(ridge.oracle()).scores()
    close(found, shapley(ridge.value, 8))
    close(found.sum(1), ridge.value(FULL) - ridge.value(()))
    small = Ridge(5)
    total = torch.zeros(4, 5, dtype=torch.float64)
    for order in itertools.permutations(range(5)):
        for place, sample in enumerate(order):
            total[:, sample] += small.value(order[: place + 1]) - small.value(order[:place])
    close(ExactShapley(small.oracle()).scores(), total / math.factorial(5))


def test_c3_downsampling_of_every_size_makes_shapley(ridge: Ridge) -> None:
    oracle = ridge.oracle()
    all_sizes = [Downsampling(oracle, share=m / 8, subsets=None).scores() for m in range(1, 8)]
    close(all_sizes[4], downsampling(ridge.value, 8, 5))
    whole = (ridge.value(FULL) - ridge.value(())).unsqueeze(1)
    close(8 * ExactShapley(oracle).scores(), whole + torch.stack(all_sizes).sum(0))


def test_c8_downsampling_of_all_but_one_is_leave_one_out(ridge: Ridge) -> None:
    oracle = ridge.oracle()
    one_out = LeaveOneOut(oracle).scores()
    expected = (8 * one_out - one_out.sum(1, keepdim=True)) / 7
    close(Downsampling(oracle, share=7 / 8, subsets=None).scores(), expected)


def test_c7_banzhaf_is_the_mean_gain_over_all_subsets(ridge: Ridge) -> None:
    expected = []
    for i in FULL:
        others = [j for j in FULL if j != i]
        subsets = [s for k in range(8) for s in itertools.combinations(others, k)]
        expected.append(torch.stack([ridge.value((*s, i)) - ridge.value(s) for s in subsets]).mean(0))
    close(Banzhaf(ridge.oracle(), subsets=None).scores(), torch.stack(expected, 1))


@pytest.mark.parametrize("kind", [Downsampling, Banzhaf])
def test_c4_drawn_subsets_err_by_one_over_their_root(kind: type[Downsampling | Banzhaf], ridge: Ridge) -> None:
    oracle = ridge.oracle()
    exact = kind(oracle, subsets=None).scores()
    errors = []
    for count in (60, 960):
        drawn = [kind(oracle, subsets=count, seed=seed) for seed in range(12)]
        squares = torch.stack([(one.scores() - exact).square() for one in drawn])
        promised = torch.stack([one.standard_errors().square() for one in drawn])
        errors.append(squares.mean().sqrt().item())
        # The subsets of one size are few, so that draws repeat; the promise is that of independent ones.
        assert promised.mean().sqrt().item() == pytest.approx(errors[-1], rel=0.2)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


def test_c5_permutations_err_by_one_over_their_root_and_always_sum_up(ridge: Ridge) -> None:
    oracle = ridge.oracle()
    exact = ExactShapley(oracle).scores()
    errors = []
    for count in (30, 480):
        drawn = [Shapley(oracle, permutations=count, tolerance=math.inf, batch=count, seed=s) for s in range(6)]
        for one in drawn:
            close(one.scores().sum(1), ridge.value(FULL) - ridge.value(()))
            assert one.permutations == count
        squares = torch.stack([(one.scores() - exact).square() for one in drawn])
        promised = torch.stack([one.standard_errors().square() for one in drawn])
        errors.append(squares.mean().sqrt().item())
        assert promised.mean().sqrt().item() == pytest.approx(errors[-1], rel=0.25)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)


def test_shapley_stops_when_it_is_sure(ridge: Ridge) -> None:
    oracle = ridge.oracle()
    found = Shapley(oracle, permutations=20_000, tolerance=0.1, batch=50)
    total = (ridge.value(FULL) - ridge.value(())).abs()
    assert (found.standard_errors().amax(1) <= 0.1 * total).all()
    assert 50 < found.permutations < 20_000
    assert ((found.scores() - ExactShapley(oracle).scores()).abs().amax(1) < 4 * 0.1 * total).all()
    with pytest.warns(RuntimeWarning, match="after 20 permutations the largest standard error"):
        Shapley(oracle, permutations=20, tolerance=1e-4).scores()


def test_c6_truncation_saves_trainings_and_is_off_by_less_than_it_says(ridge: Ridge) -> None:
    oracle = ridge.oracle()
    whole = ridge.value(FULL) - ridge.value(())
    found = Shapley(oracle, permutations=200, tolerance=math.inf, batch=200, truncation=0.2).scores()
    plain = Shapley(oracle, permutations=200, tolerance=math.inf, batch=200).scores()
    assert ((found.sum(1) - whole).abs() <= 0.2 * whole.abs()).all()
    assert not torch.equal(found, plain)
    tiny = Shapley(oracle, permutations=200, tolerance=math.inf, batch=200, truncation=1e-9).scores()
    torch.testing.assert_close(tiny, plain, rtol=0, atol=1e-8)

    saver, plainly = Ridge(), Ridge()
    for game, truncation in ((saver, 0.9), (plainly, 0.0)):
        Shapley(game.oracle(), permutations=4, tolerance=math.inf, batch=2, truncation=truncation).scores()
    assert len(saver.trained) < len(plainly.trained)


def test_a_quantity_that_no_sample_changes_costs_no_training_and_no_certainty() -> None:
    """One query that every model gets right, measured as 0 or 1, is common."""
    trained = {}
    for queries in (1, 2):
        calls: list[int] = []

        def train(samples: list[int], seed: int, calls: list[int] = calls) -> Tensor:
            calls.append(seed)
            return torch.tensor([float(len(samples) > 0), 1.0])

        oracle = SubsetOracle(train, partial(torch.narrow, dim=0, start=0, length=queries), 8)
        found = Shapley(oracle, permutations=4, batch=4, tolerance=math.inf, truncation=0.5)
        assert found.scores().shape == (queries, 8)
        trained[queries] = len(calls)
    assert trained[1] == trained[2]
    constant = SubsetOracle(lambda samples, seed: torch.tensor([float(sum(samples)) ** 2, 1.0]), lambda m: m, 5)
    with pytest.warns(RuntimeWarning, match=r"the largest standard error is 0\.\d+ of"):
        Shapley(constant, permutations=4, tolerance=1e-9).scores()


def test_c10_axioms() -> None:
    ridge = Ridge()
    ridge.x[7], ridge.y[7] = ridge.x[6], ridge.y[6]
    ridge.x[0] = 0  # ridge without an intercept takes nothing from it
    found = ExactShapley(ridge.oracle()).scores()
    close(found[:, 6], found[:, 7])
    close(found[:, 0], torch.zeros(4, dtype=torch.float64))
    other = Ridge()
    both = SubsetOracle(
        lambda samples, seed: ridge.value(tuple(samples)) + 2 * other.value(tuple(samples)), lambda value: value, 8
    )
    close(ExactShapley(both).scores(), found + 2 * ExactShapley(other.oracle()).scores())


@pytest.mark.parametrize(("n", "k"), [(7, 1), (7, 3), (3, 5), (4, 4)])
def test_c9_neighbours_shapley_is_that_of_enumeration(n: int, k: int) -> None:
    features, labels = torch.randn(n, 2), torch.randint(2, (n,))
    queries = torch.randn(3, 2), torch.tensor([0, 1, 1])
    order = torch.cdist(queries[0], features).argsort(1)

    def utility(subset: tuple[int, ...]) -> Tensor:
        nearest = [[i for i in line.tolist() if i in subset][:k] for line in order]
        right = [sum(int(labels[i] == label) for i in near) for near, label in zip(nearest, queries[1], strict=True)]
        return torch.tensor(right, dtype=torch.float64) / k

    estimator = KNNShapley(features, labels, k=k)
    close(estimator.scores(queries), shapley(utility, n))
    close(estimator.self_influence(), estimator.scores((features, labels)).diagonal())


def test_neighbours_are_the_same_wherever_the_features_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (60,), generator=generator)
    near, far = (KNNShapley(features + shift, labels).scores((features + shift, labels)) for shift in (0, 1e8))
    close(near, far)


def test_a_sample_is_its_own_neighbour_before_its_duplicates() -> None:
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    labels = torch.arange(60) < 30  # the same image, labelled once so and once so
    own = KNNShapley(features, labels, k=1).self_influence()
    assert (own > 0.5).all()


def test_neighbours_errors() -> None:
    features, labels = torch.randn(4, 2), torch.zeros(4)
    with pytest.raises(QueryError, match="at least 1 neighbour"):
        KNNShapley(features, labels, k=0)
    with pytest.raises(QueryError, match=r"features of the training samples have shape \(4, 2\)"):
        KNNShapley(features, labels[:3])
    with pytest.raises(QueryError, match="data_id names 2"):
        KNNShapley(features, labels, data_id=[1, 2])
    with pytest.raises(QueryError, match="of the queries"):
        KNNShapley(features, labels).scores((features[0], labels))
    with pytest.raises(QueryError, match=r"must be \[samples, 2\]"):
        KNNShapley(features, labels).scores((torch.randn(4, 3), labels))
    with pytest.raises(QueryError, match="a query is a pair"):
        KNNShapley(features, labels).scores(features)
    with pytest.raises(QueryError, match=r"k is 2\.5"):
        KNNShapley(features, labels, k=2.5)
    with pytest.raises(QueryError, match="no training samples"):
        KNNShapley(features[:0], labels[:0])
    with pytest.raises(QueryError, match="features of the queries are NaN"):
        KNNShapley(features, labels).scores((features * math.nan, labels))


ALL: list[type[RetrainedEstimator]] = [LeaveOneOut, Downsampling, Banzhaf, ExactShapley, Shapley]


@pytest.mark.filterwarnings("ignore:after 1000 permutations")
@pytest.mark.parametrize("kind", ALL)
def test_the_interface_of_every_one(kind: type[RetrainedEstimator], ridge: Ridge) -> None:
    estimator = kind(ridge.oracle(), data_id=[f"s{i}" for i in range(8)], own=[0, 1, 2, 3, 0, 1, 2, 3])
    scores = estimator.scores()
    assert scores.shape == (4, 8)
    assert torch.equal(estimator.scores([2]), scores[2:3])
    own = estimator.self_influence()
    assert torch.equal(own, scores[torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), torch.arange(8)])
    result = estimator.influence([1], query_id=("q",))
    assert result.proponents(1).ids[0, 0] == f"s{int(scores[1].argmax())}"
    for wrong in ([4], [-1], [True, False], torch.tensor([True, False, True, True])):
        with pytest.raises(QueryError, match=r"queries is \[.*what is measured has the indices 0 to 3, and a mask"):
            estimator.scores(wrong)
    for shapeless in (2, [0.5], torch.tensor([[0], [1]])):
        with pytest.raises(QueryError, match="give a sequence of indices"):
            estimator.scores(shapeless)
    with pytest.raises(QueryError, match="give own="):
        kind(ridge.oracle()).self_influence()
    with pytest.raises(QueryError, match="own names 1"):
        kind(ridge.oracle(), own=[0]).self_influence()
    with pytest.raises(QueryError, match=r"own is .*give a sequence of indices"):
        kind(ridge.oracle(), own=torch.zeros(8)).self_influence()
    with pytest.raises(QueryError, match=r"own is .*and a mask names none"):
        kind(ridge.oracle(), own=[True] * 8).self_influence()
    with pytest.raises(QueryError, match="data_id names 1"):
        kind(ridge.oracle(), data_id=["a"])


def test_too_few_subsets_are_refused(ridge: Ridge) -> None:
    with pytest.raises(RetrainingError, match="in all or in none of the 2 subsets"):
        Downsampling(ridge.oracle(), subsets=2).scores()
    with pytest.raises(RetrainingError, match="share is 1"):
        Downsampling(ridge.oracle(), share=1.0)
    with pytest.raises(RetrainingError, match="share is nan"):
        Downsampling(ridge.oracle(), share=math.nan)
    for count in (0, -1):
        with pytest.raises(RetrainingError, match=f"the number of subsets is {count}; at least 1"):
            Banzhaf(ridge.oracle(), subsets=count).scores()
    with pytest.raises(RetrainingError, match=r"the number of subsets is 1\.5; it must be a whole number"):
        Downsampling(ridge.oracle(), subsets=1.5).scores()
    with pytest.raises(RetrainingError, match="at least 2 of each"):
        Shapley(ridge.oracle(), permutations=1)
    for wrong in ({"tolerance": -0.1}, {"tolerance": math.nan}, {"truncation": 1.0}, {"truncation": math.nan}):
        with pytest.raises(RetrainingError, match="they are shares of"):
            Shapley(ridge.oracle(), **wrong)


def test_a_subset_that_cannot_be_trained_is_named() -> None:
    labels = [0, 0, 0, 1]

    def train(samples: list[int], seed: int) -> Tensor:
        if len({labels[i] for i in samples}) < 2:
            raise ValueError("needs samples of both classes")
        return torch.zeros(1)

    with pytest.raises(RetrainingError, match=r"1 retrainings failed: training on 3 samples .*both classes"):
        LeaveOneOut(SubsetOracle(train, lambda model: model, 4)).scores()


@pytest.mark.parametrize("kind", [Downsampling, Banzhaf])
def test_a_drawn_subset_that_fails_loses_no_other(kind: type[Downsampling | Banzhaf], ridge: Ridge) -> None:
    """One in many lacks a class, or holds nothing."""

    def train(samples: list[int], seed: int) -> Tensor:
        if not {0, 1, 2} & set(samples):
            raise ValueError("a class is missing")
        return ridge.value(tuple(samples))

    estimator = kind(SubsetOracle(train, lambda value: value, 8), subsets=60, **options_of(kind))
    with pytest.warns(RuntimeWarning, match=r"\d+ of 60 subsets are left out: .*a class is missing"):
        found = estimator.scores()
    assert found.isfinite().all()
    assert estimator.standard_errors().isfinite().all()
    with pytest.raises(RetrainingError, match=r"retrainings failed: .*a class is missing"):
        kind(SubsetOracle(train, lambda value: value, 8), subsets=None, **options_of(kind)).scores()


def options_of(kind: type[Downsampling | Banzhaf]) -> dict[str, float]:
    return {"share": 0.5} if kind is Downsampling else {}


def test_queries_may_be_a_tensor_of_indices(ridge: Ridge) -> None:
    estimator = LeaveOneOut(ridge.oracle())
    for queries in ([2], [3, 0]):
        assert torch.equal(estimator.scores(torch.tensor(queries)), estimator.scores(queries))


@pytest.mark.filterwarnings("ignore:after 8 permutations")
def test_shapley_after_a_failure_is_as_without_one(ridge: Ridge) -> None:
    failing = iter([False] * 40 + [True])

    def train(samples: list[int], seed: int) -> Tensor:
        if next(failing, False):
            raise OSError("the disk was full")
        return ridge.value(tuple(samples))

    options = {"permutations": 8, "batch": 4, "tolerance": 0.0}
    broken = Shapley(SubsetOracle(train, lambda value: value, 8), **options)
    with pytest.raises(RetrainingError, match="the disk was full"):
        broken.scores()
    whole = Shapley(ridge.oracle(), **options)
    assert broken.permutations == whole.permutations == 8
    close(broken.standard_errors(), whole.standard_errors())
