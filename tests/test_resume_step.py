"""A training that goes back to an older checkpoint, and samples that are to be forgotten."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import logix_like as logix
from logix_like.errors import ConfigError, StoreError
from logix_like.query import completion
from logix_like.store import open_store, repair
from logix_like.store.format.damage import array_file
from logix_like.store.writing.pipeline import RowPipeline
from tests.training import batches, data, full, network

STEPS_TO = 1e-6
"""Statistics of a run that was gone on with against those of one without a break."""


def train(run: logix.Run, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    x, y = data()
    order = list(batches())
    for step in steps:
        run.epoch(step // len(order))
        index = order[step % len(order)]
        with run(data_id=index):
            F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        optimizer.zero_grad()


def begin(root: Path, model: nn.Module, **options: Any) -> tuple[logix.Run, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = logix.init("run", model, full(root), optimizer=optimizer, verbose=False, **options)
    return run, optimizer


def gone_back(root: Path, *, again: int = 10) -> tuple[logix.Run, nn.Module]:
    """Seven steps, then back to the weights after four, and on to ``again``."""
    model = network()
    run, optimizer = begin(root, model)
    train(run, model, optimizer, range(4))
    kept = copy.deepcopy(model.state_dict())
    run.checkpoint()
    train(run, model, optimizer, range(4, 7))
    run.checkpoint()
    run.finalize()
    model.load_state_dict(kept)
    run, optimizer = begin(root, model, resume=True, resume_step=4)
    train(run, model, optimizer, range(4, again))
    return run, model


def test_a_training_gone_back_on_is_as_one_without_a_break(tmp_path: Path) -> None:
    model = network()
    whole, optimizer = begin(tmp_path / "whole", model)
    train(whole, model, optimizer, range(10))
    whole.finalize()
    run, again = gone_back(tmp_path / "back")
    assert run.resumed_at == (0, 3)
    run.finalize()
    expected, found = whole.store, run.store
    kept = np.flatnonzero(found.valid)
    assert len(found) == len(kept) + 13  # three batches of 5, 5 and 3
    for column in ("data_id", "step", "epoch"):
        assert list(getattr(found, column)[kept]) == list(getattr(expected, column))
    assert torch.equal(found.gradients[kept], expected.gradients[:])
    assert [c.step for c in found.checkpoints] == [4]
    scores = [ask(one, net).scores for one, net in ((run, again), (whole, model))]
    assert (scores[0] - scores[1]).abs().max() <= STEPS_TO * scores[1].abs().max()


def ask(run: logix.Run, model: nn.Module, preconditioner: str = "covariance") -> logix.InfluenceResult:
    x, y = data()
    with run.query(data_id=["q"]) as query:
        F.cross_entropy(model(x[:1]), y[:1]).backward()
    return run.compute_influence_all(query, preconditioner=preconditioner)


def test_what_kronecker_factors_still_hold_is_said(tmp_path: Path) -> None:
    run, model = gone_back(tmp_path)
    run.finalize()
    assert "Kronecker factors also of 13 rows that were taken back" in str(ask(run, model, "kfac"))
    assert "taken back" not in str(ask(run, model))


def test_a_step_beyond_the_rows_is_warned_of(tmp_path: Path) -> None:
    model = network()
    run, optimizer = begin(tmp_path, model)
    train(run, model, optimizer, range(3))
    run.finalize()
    with pytest.warns(RuntimeWarning, match="from step 6, but rows of the first 3 steps only were committed"):
        again, _ = begin(tmp_path, model, resume=True, resume_step=6)
    again.finalize()


@pytest.mark.parametrize(("options", "said"), [({}, "resume=True too"), ({"resume": True}, "resume_step, .*, is -1")])
def test_a_step_that_makes_no_sense_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        begin(tmp_path, network(), resume_step=-1, **options)
    assert not (tmp_path / "run").exists()


def test_forgotten_samples_are_in_no_answer(tmp_path: Path) -> None:
    model = network()
    run, optimizer = begin(tmp_path, model)
    train(run, model, optimizer, range(7))
    assert run.forget([0, 7]) == 4  # both were visited twice
    train(run, model, optimizer, range(7, 10))
    for _ in range(2):
        assert sorted(run.store.view("mean").data_id) == sorted({*range(23)} - {0, 7})
        assert not {0, 7} & set(ask(run, model).data_id)
        run.finalize()
    assert run.forget(torch.tensor([5])) == 2
    assert 5 not in ask(run, model).data_id


def test_forgetting_what_cannot_be_forgotten_is_refused(tmp_path: Path) -> None:
    model = network()
    settings = {"root": str(tmp_path), "projection": {"init": "pca", "rank": 2, "warmup": 100}}
    run = logix.init("run", model, settings, verbose=False)
    x, y = data()
    with run(data_id=range(5)):
        F.cross_entropy(model(x[:5]), y[:5]).backward()
    with pytest.raises(StoreError, match="cannot be forgotten while blocks wait"):
        run.forget([0])
    run.finalize()
    with pytest.raises(StoreError, match="loaded for queries"):
        logix.load(tmp_path / "run").forget([0])
    with pytest.raises(StoreError, match="nothing was taken back"):
        run.forget([99])


EVERYTHING = ["mean", "variance", "covariance", "kronecker", "corrected_eigval"]


def killed(root: Path, steps: int, *, summed: int) -> dict[str, Any]:
    """A run that was killed behind so many steps, and had written its statistics behind ``summed`` of them."""
    model = network()
    run, optimizer = begin(root / "live", model, statistics=EVERYTHING)
    train(run, model, optimizer, range(summed))
    run.commit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowPipeline, "save_statistics", lambda *_: None)
        train(run, model, optimizer, range(summed, steps))
        run.commit()
    shutil.copytree(run.path, root / "run")
    run.finalize()
    return model.state_dict()


@pytest.mark.parametrize("summed", [0, 3, 5])
@pytest.mark.parametrize("back", [0, 2])
def test_a_resumed_run_ends_with_the_statistics_of_one_without_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summed: int, back: int
) -> None:
    weights, model = killed(tmp_path, 5, summed=summed), network()
    whole, optimizer = begin(tmp_path / "whole", model, statistics=EVERYTHING)
    train(whole, model, optimizer, range(5 - back))
    weights = copy.deepcopy(model.state_dict()) if back else weights
    train(whole, model, optimizer, range(5 - back, 10))
    whole.finalize()
    model = network()
    model.load_state_dict(weights)
    run, optimizer = begin(tmp_path, model, resume=True, statistics=EVERYTHING, resume_step=5 - back)
    train(run, model, optimizer, range(5 - back, 10))
    run.finalize()
    found, expected = run.store.statistics, whole.store.statistics
    assert found.rows == len(run.store) and found.stale == 0
    assert run.store.covered_rows == {writer.name: writer.rows for writer in run.store.writers}
    for block in expected.layout:
        for name in ("mean", "variance", "covariance"):
            ours, theirs = getattr(found, name)(block.name), getattr(expected, name)(block.name)
            torch.testing.assert_close(ours, theirs, rtol=STEPS_TO, atol=STEPS_TO * float(theirs.abs().max()))
    assert found.kronecker("0").input.isfinite().all()
    monkeypatch.setattr(completion, "StatisticsAccumulator", pytest.fail)  # no row is summed for a query
    monkeypatch.setattr(completion, "corrected_sums", pytest.fail)
    assert ask(run, model).scores.isfinite().all()
    assert ask(run, model, "ekfac").scores.isfinite().all()
    assert run.store.statistics.stale == 0 != run.forget([3]) == run.store.statistics.stale


@pytest.mark.parametrize("resumed", [True, False])
def test_statistics_of_a_store_that_lost_covered_rows_are_not_used(tmp_path: Path, resumed: bool) -> None:
    """Also where as many rows are left as were summed up."""
    killed(tmp_path, 5, summed=4)
    if resumed:
        run, optimizer = begin(tmp_path, model := network(), resume=True, statistics=EVERYTHING)
        train(run, model, optimizer, range(5, 10))
        run.finalize()
    path = tmp_path / "run"
    first = open_store(path).writers[0]
    file = array_file(first.folder, first.commits.rows[0], "gradients")
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    lost = first.commits.rows[0].rows
    assert open_store(path, on_damage="skip").statistics.stale > 0
    assert repair(path).rows == lost
    assert open_store(path).statistics.stale > 0
