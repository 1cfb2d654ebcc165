"""Questions as a user puts them: through the run, with the config's settings unless told otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from logix_like.errors import ConfigError, QueryError, StoreError
from logix_like.run.asking import Query
from tests.training import data, network, trained_run

COUNT = 40


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(3, (COUNT,))


@pytest.fixture
def run(tmp_path: Path, labels: Tensor) -> Iterator[logix.Run]:
    """Forty samples; number 30 is a copy of number 3."""
    model, inputs = nn.Linear(5, 3), torch.randn(COUNT, 5)
    inputs[30], labels[30] = inputs[3], labels[3]
    settings = {"damping": {"absolute": 0.02}, "preconditioner": "covariance"}
    with logix.init("questions", model, root=str(tmp_path), query=settings, verbose=False) as run:
        for start in range(0, COUNT, 10):
            part = slice(start, start + 10)
            with run(data_id=range(start, start + 10), metadata={"label": labels[part].tolist()}):
                nn.functional.cross_entropy(model(inputs[part]), labels[part]).backward()
        run.commit()
        yield run


@pytest.fixture
def query(run: logix.Run) -> Query:
    model = run._logbook.tracker.model
    with run.query(data_id=["q0", "q1"]) as query:
        nn.functional.cross_entropy(model(torch.randn(2, 5)), torch.tensor([0, 1])).backward()
    return query


def test_samples_are_chosen_by_the_columns_that_were_logged(run: logix.Run, query: Query, labels: Tensor) -> None:
    some = run.compute_influence_all(query, where={"label": 1})
    expected = [i for i in range(COUNT) if labels[i] == 1]
    assert some.data_id.tolist() == expected
    assert some.damping == {"absolute": 0.02}
    split = run.compute_influence(query, expected[:2], k=1, per="module", normalize=True)
    assert len(split.part_names) == 1
    torch.testing.assert_close(split.top.parts.sum(2), split.top.scores)


def test_sets_follow_the_configs_damping(run: logix.Run, query: Query) -> None:
    every = run.compute_influence_all(query).scores
    first = run.compute_group_influence(query, {"a": [1, 2], "b": range(10)})
    torch.testing.assert_close(first.scores, torch.stack([every[:, 1:3].sum(1), every[:, :10].sum(1)], 1))
    second = run.compute_group_influence(query, [1, 2], order=2)
    assert not second.scores.equal(first.scores[:, :1]) and "0.02 (absolute)" in second.note
    other = run.compute_group_influence(query, [1, 2], damping=1.0)
    assert not other.scores.equal(first.scores[:, :1])
    with pytest.raises(ConfigError, match="unknown query option 'mode'"):
        run.compute_group_influence(query, [1], mode="cosine")


def test_a_copy_is_found(run: logix.Run) -> None:
    result = run.find_similar([3], k=4)
    assert result.proponents().ids[0, 0] == 30
    assert result.proponents().scores[0, 0].item() == pytest.approx(1, abs=1e-5)
    assert result.mode == "cosine" and result.preconditioner == "identity"
    assert run.find_similar([3], k=1, preconditioner="covariance", mode="l2").proponents().ids.tolist() == [[30]]


def test_leverages_of_a_run(run: logix.Run) -> None:
    assert run.compute_self_influence().leverage.max() < 1


def test_a_query_in_train_mode_is_warned_of_where_that_matters(tmp_path: Path) -> None:
    """Dropout makes a query one of a random mask; a network without any answers alike in both modes."""
    x, y = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    for model, heard in ((nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)), 1), (nn.Sequential(nn.Linear(6, 3)), 0)):
        run = logix.init(f"run{heard}", model, root=tmp_path, verbose=False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                with run.query(data_id=["q"]) as query:
                    F.cross_entropy(model(x[:1]), y[:1]).backward()
            assert len(said) == heard
            assert all("(1)" in str(w.message) and "model.eval()" in str(w.message) for w in said)
            assert all(w.filename == __file__ for w in said)
            model.eval()
            with run.query(data_id=["q"]) as query:
                assert "no gradients" in repr(query)
                with pytest.raises(QueryError, match="still open"):
                    query.gradients  # noqa: B018
                F.cross_entropy(model(x[:1]), y[:1]).backward()
        assert repr(query) == "Query(data_id=['q'], gradients)"


def test_blocks_of_a_closed_run_that_nobody_asks_for_are_warned_of(tmp_path: Path) -> None:
    """LogIX's way of asking reads each; a training that goes on with the wrong run does not."""
    model, x, y = nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    run = logix.init("run", model, root=tmp_path, verbose=False)

    def block() -> None:
        with run(data_id=range(4)):
            F.cross_entropy(model(x), y).backward()

    block()
    assert "logging, 4 rows" in repr(run)
    run.finalize()
    for _ in range(3):
        block()
        run.get_log()
    block()
    with pytest.warns(RuntimeWarning, match=r"nothing is stored.*resume=True") as said:
        block()
    assert said[0].filename == __file__
    assert "finalized" in repr(run) and len(run.store) == 4


def test_one_stored_sample_may_be_named_by_its_id_alone(tmp_path: Path) -> None:
    model, x, y = nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    with logix.init("run", model, root=tmp_path, verbose=False) as run, run(data_id=["a", "b", "c", 7]):
        F.cross_entropy(model(x), y).backward()
    log = run.get_log()
    assert run.find_similar("b", k=2).top.ids.tolist() == run.find_similar(["b"], k=2).top.ids.tolist()
    assert run.compute_influence(log, data_id=7).data_id.tolist() == [7]
    assert run.forget("a") == 1


@pytest.mark.parametrize("which", [2, "first", [], [1, 3], torch.tensor([1])])
def test_checkpoints_that_are_none_are_refused_by_name(tmp_path: Path, which: Any) -> None:
    model, batch = nn.Sequential(nn.Linear(6, 3)), (torch.randn(4, 6), torch.zeros(4, dtype=torch.long))
    run = logix.init("run", model, root=tmp_path, verbose=False)
    with run(data_id=range(4)):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
    run.checkpoint()
    run.finalize()
    with pytest.raises(StoreError, match=r"were asked for; there are 'all', 'last' and the numbers 1"):
        run.query_fn(batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]), checkpoints=which)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    logix.init("run", nn.Sequential(nn.Linear(6, 3)), root="~/stores", verbose=False).finalize()
    assert logix.load("~/stores/run").path == tmp_path / "stores" / "run"


@pytest.mark.parametrize(("model", "found"), [(nn.Linear, "the class Linear"), ([nn.Linear(2, 2)], "a list")])
def test_what_is_no_model_is_refused(tmp_path: Path, model: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=f"the model is {found}"):
        logix.init("run", model, root=tmp_path)


def test_a_model_whose_weights_are_frozen_can_be_asked_with(tmp_path: Path) -> None:
    """As models are often loaded when they are used, and no longer trained."""
    x, y = data()
    trained = trained_run(tmp_path, network())
    answers = []
    for model in (network(), network().requires_grad_(False)):
        run = logix.load(tmp_path / "run", model=model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the weights are those of the start
            query = run.query_fn((x[:2], y[:2]), lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
            tokens = run.token_scores(query, (x, y), lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
        answers.append((run.compute_influence_all(query).scores, tokens.scores))
        assert all(parameter.grad is None for parameter in model.parameters())
    assert len(trained.store) == len(x)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-12, atol=1e-12)
