"""Workflows on a tiny run, and on scores in which the answer is planted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from logix_like.errors import EvaluationError, QueryError
from logix_like.estimators.stored import StoredInfluence
from logix_like.objective import Gaussian, Objective
from logix_like.query.result import Ids
from logix_like.retraining import SubsetOracle
from logix_like.workflows import curate, detect_poison, explain, find_mislabeled
from tests import training
from tests.evaluation.additive import Additive


@pytest.fixture
def model() -> nn.Module:
    return training.network()


@pytest.fixture
def run(tmp_path: Path, model: nn.Module) -> logix.Run:
    return training.trained_run(tmp_path, model, epochs=3, checkpoints="every_epoch", store={"dtype": "float64"})


def test_explain_asks_about_the_models_own_answers(run: logix.Run, model: nn.Module) -> None:
    x, y = training.data()
    answers = model(x).argmax(1)
    assert not torch.equal(answers, y)
    with run.query(range(len(x))) as query:
        F.cross_entropy(model(x), answers).backward()
    expected = run.compute_influence_all(query)
    model.train()
    found = explain(run, model, (x, y), k=None)
    assert model.training
    torch.testing.assert_close(found.scores, expected.scores)
    with run.query(range(len(x))) as query:
        F.cross_entropy(model(x), y).backward()
    given = explain(run, model, (x, y), k=None, predicted=False, data_id=[f"q{i}" for i in range(len(x))])
    torch.testing.assert_close(given.scores, run.compute_influence_all(query).scores)
    assert given.query_id[:2] == ("q0", "q1")


@pytest.mark.parametrize("checkpoints", [None, "all"])
def test_explain_asks_the_model_in_use_and_leaves_each_module_in_its_mode(
    tmp_path: Path, checkpoints: str | None
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    run = training.trained_run(tmp_path, model, epochs=2, checkpoints="every_epoch")
    x, y = training.data()
    expected = explain(run, model.eval(), (x, y), k=None, checkpoints=checkpoints)
    model.train()
    model[1].eval()
    found = explain(run, model, (x, y), k=None, checkpoints=checkpoints)
    assert torch.equal(found.scores, expected.scores)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_explain_over_checkpoints_and_with_options(run: logix.Run, model: nn.Module) -> None:
    x, y = training.data()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    query = run.query_fn((x, model(x).argmax(1)), loss, checkpoints="all")
    found = explain(run, model, (x, y), k=3, checkpoints="all", mode="cosine")
    expected = run.compute_influence_all(query, k=3, mode="cosine")
    assert (found.proponents().ids == expected.proponents().ids).all()
    assert found.mode == "cosine"


def test_explain_leaves_out_positions_that_do_not_count(run: logix.Run, model: nn.Module) -> None:
    x, y = training.data()
    hidden = y.clone()
    hidden[0] = -100
    assert explain(run, model, (x[:2], hidden[:2]), k=None).scores[0].abs().max() == 0


def test_explain_needs_classes_to_predict_one(run: logix.Run, model: nn.Module) -> None:
    x, _ = training.data()
    with pytest.raises(QueryError, match="a Gaussian likelihood has no loss to explain"):
        explain(run, model, (x, torch.zeros(len(x), 3)), objective=Objective(Gaussian()))


def test_stored_influence_is_the_runs_own_answer(run: logix.Run, model: nn.Module) -> None:
    x, y = training.data()
    with run.query(["a", "b"]) as query:
        F.cross_entropy(model(x[:2]), y[:2]).backward()
    estimator = StoredInfluence(run, damping=0.3, mode="cosine", reduce="last")
    result = run.compute_influence_all(query, damping=0.3, mode="cosine", reduce="last")
    assert torch.equal(estimator.scores(query), result.scores)
    assert estimator.data_id.tolist() == result.data_id.tolist()
    own = run.compute_self_influence(damping=0.3, reduce="last")
    assert torch.equal(estimator.self_influence(), own.scores)


def test_find_mislabeled_by_self_influence_and_by_harm(run: logix.Run, model: nn.Module) -> None:
    x, y = training.data()
    own = run.compute_self_influence()
    found = find_mislabeled(run, share=0.2)
    assert found.data_id.tolist() == own.highest(5).ids[0].tolist()
    assert find_mislabeled(StoredInfluence(run), share=0.2).data_id.tolist() == found.data_id.tolist()
    assert str(found).startswith("5 of 23 samples to check")
    with run.query(range(len(x))) as query:
        F.cross_entropy(model(x), y).backward()
    harm = -run.compute_influence_all(query).scores.sum(0)
    by_harm = find_mislabeled(run, share=1.0, validation=query)
    assert torch.equal(by_harm.scores, harm.sort(descending=True).values)
    assert torch.equal(find_mislabeled(StoredInfluence(run), share=1.0, validation=query).scores, by_harm.scores)
    with pytest.raises(EvaluationError, match="share=, not k="):
        find_mislabeled(run, validation=query, k=5)
    with pytest.raises(EvaluationError, match=r"takes no options here \(damping\)"):
        find_mislabeled(StoredInfluence(run), damping=0.5)
    with pytest.raises(EvaluationError, match=r"share is 0\.001: 0 of 23"):
        find_mislabeled(run, share=0.001)
    with pytest.raises(EvaluationError, match="share is nan: 0 of 23"):
        find_mislabeled(run, share=math.nan)
    for validation in (None, query):  # a sample of three visits would fill three places
        with pytest.raises(EvaluationError, match="samples are ranked, not their visits"):
            find_mislabeled(run, validation=validation, reduce="none")
    with pytest.raises(EvaluationError, match="the source is a Tensor; give a run or an estimator"):
        find_mislabeled(torch.zeros(23))
    with pytest.raises(EvaluationError, match="1 of 4 samples have no finite score"):
        find_mislabeled(Diverged())


def test_curate_trains_on_no_more_than_it_compares() -> None:
    trained = []

    def train(samples: list[int], seed: int) -> float:
        trained.append(samples)
        return float(sum(samples))

    curate(SubsetOracle(train, torch.tensor, 30), torch.arange(30.0), drop=0.2, draws=3)
    assert len(trained) == 5  # all samples, without the worst, and three random ones


class Diverged(StoredInfluence):
    """One sample's score is NaN."""

    def __init__(self) -> None:
        """Asks no run."""

    @property
    def data_id(self) -> Ids:
        """Numbers."""
        return np.arange(4).astype(object)

    def self_influence(self) -> Tensor:
        """Of 4 samples."""
        return torch.tensor([1.0, math.nan, 2.0, 3.0])


def test_curate_drops_what_harms() -> None:
    world = Additive(q=1)
    values = world.effects[0]
    found = curate(world.oracle, values, drop=0.25, draws=50)
    assert list(found.dropped) == values.argsort()[:15].tolist()
    assert sorted(found.kept + found.dropped) == list(range(60))
    assert found.before == pytest.approx(values.sum().item())
    assert found.after == pytest.approx(values.sort().values[15:].sum().item())
    assert found.after > found.random.max().item()
    assert "without 15 of 60 samples" in str(found)
    for drop in (0.0, 1.0, math.nan):
        with pytest.raises(EvaluationError, match=f"drop is {drop}: .*some must go and some must be kept"):
            curate(world.oracle, values, drop=drop)
    with pytest.raises(EvaluationError, match=r"needs a SubsetOracle.*find_mislabeled"):
        curate(values, values)
    with pytest.raises(EvaluationError, match=r"drop is most: 0 of 60"):
        curate(world.oracle, values, drop="most")


def test_curate_takes_no_self_influence_for_a_value(run: logix.Run) -> None:
    oracle = Additive(n=23, q=1).oracle
    for suspicion in (StoredInfluence(run), run.compute_self_influence()):
        with pytest.raises(EvaluationError, match="self-influence is no value: wrong labels have the highest"):
            curate(oracle, suspicion, data_id=[f"s{i}" for i in range(training.SAMPLES)])


def planted(queries: int = 60, samples: int = 500) -> Tensor:
    """Scores of noise; those of the first 8 queries are high for samples 100 to 107."""
    scores = torch.randn(queries, samples, generator=torch.Generator().manual_seed(0))
    scores[:8, 100:108] += 5
    return scores


def test_a_planted_group_is_found() -> None:
    found = detect_poison(planted().numpy())
    assert found.suspicious.nonzero().flatten().tolist() == list(range(8))
    assert set(found.first(8)) == set(range(100, 108))
    assert found.overlap > 0.7
    assert str(found).startswith("8 of 60 queries hang on the same few samples")


def test_queries_that_the_planted_samples_oppose_are_no_yardstick() -> None:
    """The planted samples hold none of the others' positive influence, and a little of a few clean queries'."""
    scores = planted()
    scores[8:, 100:108] -= 5
    scores[20, 100], scores[21, 104] = 0.2, 0.1
    found = detect_poison(scores)
    assert found.suspicious.nonzero().flatten().tolist() == list(range(8))


def test_without_one_nothing_is_suspicious() -> None:
    found = detect_poison(torch.randn(60, 500, generator=torch.Generator().manual_seed(1)))
    assert not found.suspicious.any()
    assert not found.samples.any()
    assert found.first(3) == []
    assert "no group among 60 queries" in str(found)


def test_poison_is_named_as_the_samples_are(run: logix.Run, model: nn.Module) -> None:
    x, y = training.data()
    found = detect_poison(explain(run, model, (x, y), k=None), top=5, group=3, overlap=0.0, deviations=0.0)
    assert set(found.first(3)) < {f"s{i}" for i in range(training.SAMPLES)}
    assert detect_poison(planted(), data_id=[f"x{i}" for i in range(500)]).first(1)[0][0] == "x"
    with pytest.raises(EvaluationError, match="ask without k="):
        detect_poison(explain(run, model, (x, y), k=2))
    with pytest.raises(EvaluationError, match="scores visits, not samples"):
        detect_poison(explain(run, model, (x, y), k=None, reduce="none"))
    assert detect_poison(planted(), data_id=torch.arange(500) + 7).first(1)[0] in range(107, 115)
    with pytest.raises(EvaluationError, match=r"shape \(\)"):
        detect_poison(1.0)
    with pytest.raises(EvaluationError, match=r"scores are a StoredInfluence; give a result \(an estimator's is infl"):
        detect_poison(StoredInfluence(run))
    with pytest.raises(EvaluationError, match="complex numbers"):
        detect_poison(torch.complex(planted(), planted()))
    with pytest.raises(EvaluationError, match="data_id names 1 samples; the scores have 500"):
        detect_poison(planted(), data_id=["a"])
    with pytest.raises(EvaluationError, match=r"top is 2.5, group .*a whole number"):
        detect_poison(planted(), top=2.5)
    with pytest.raises(EvaluationError, match="top is 10, group 0"):
        detect_poison(planted(), group=0)
    with pytest.raises(EvaluationError, match="deviations nan"):
        detect_poison(planted(), deviations=math.nan)
    with pytest.raises(EvaluationError, match="there are 10 queries"):
        detect_poison(planted()[:10])
    with pytest.raises(EvaluationError, match=r"shape \(500,\)"):
        detect_poison(planted()[0])
