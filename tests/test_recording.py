"""What ``record: path`` keeps: every step, the settings it was taken with, and the optimizer's state."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import logix_like as logix
from logix_like.errors import (
    CaptureError,
    ConfigError,
    ModelMismatchError,
    StoreDamagedError,
    StoreError,
    StoreWriteError,
)
from logix_like.estimators.checkpointed import TracInCP
from logix_like.estimators.unrolling import ExactUnrolling
from logix_like.path import PathStep
from logix_like.ranks import Ranks
from logix_like.store import PathJournal, create_store, verify
from logix_like.store.format.journal import journals, read_journal
from logix_like.store.places import local
from tests.path_runs import OBJECTIVE, batch_of, network, queries, train
from tests.store.broken_disk import BrokenDisk


def resumed_at_two(folder: Path) -> tuple[logix.Run, nn.Module, torch.optim.Optimizer]:
    """A run that goes on behind the second step of one that :func:`train` made."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    run = logix.init(
        "run", model, root=str(folder), record="path", optimizer=optimizer, resume=True, resume_step=2,
        projection={"init": "identity"}, store={"dtype": "float64"}, verbose=False,
    )  # fmt: skip
    return run, model, optimizer


def test_every_step_is_recorded_as_it_was_taken(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "momentum": 0.9}], lr=0.1
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run = logix.init("run", model, root=str(tmp_path), record="path", optimizer=optimizer, verbose=False)
    for step in range(3):
        run.epoch(step)
        for part in ([step, step + 1], [5]):
            x, y = batch_of(part)
            with run(data_id=part, scale=0.5):
                (0.5 * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    run.finalize()
    path = run.training_path
    assert path.optimizer == "SGD" and path.groups == (("0.weight", "0.bias"), ("2.weight", "2.bias"))
    assert [(s.step, s.epoch) for s in path.steps] == [(0, 0), (1, 1), (2, 2)]
    assert [[(b.data_id, b.weight) for b in s.blocks] for s in path.steps] == [
        [((s, s + 1), 0.25), ((5,), 0.5)] for s in range(3)
    ]
    assert [[g["lr"] for g in s.settings] for s in path.steps] == [[0.2, 0.1], [0.1, 0.05], [0.05, 0.025]]
    assert [g["momentum"] for g in path.steps[0].settings] == [0, 0.9]
    assert [c.step for c in path.checkpoints] == [0, 3]
    assert verify(run.path).ok


def test_a_checkpoint_gives_model_and_optimizer_back(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    settings = {"root": str(tmp_path), "record": "path", "checkpoints": {"at_steps": [2]}}
    run = logix.init("run", model, settings, optimizer=optimizer, verbose=False)
    kept = None
    for step in range(4):
        x, y = batch_of([step, step + 1])
        with run(data_id=[step, step + 1]):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            kept = (model[0].weight.detach().clone(), optimizer.state[model[0].weight]["exp_avg_sq"].clone())
    run.finalize()
    state = run.at(2)
    assert (state.step, [c.step for c in run.training_path.checkpoints]) == (2, [0, 2, 4])
    assert torch.equal(state.weights["0.weight"], kept[0])
    assert torch.equal(state.moments["0.weight"]["exp_avg_sq"], kept[1])
    assert not run.at(1).moments
    with pytest.raises(StoreError, match="no checkpoint 9; there are: 1, 2, 3"):
        run.at(9)


def test_only_training_is_recorded(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = logix.init("run", model, root=str(tmp_path), record="path", optimizer=optimizer, every=2, verbose=False)
    x, y = batch_of([0, 1])
    run.extract([(x, y)], lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), progress=False)
    for step in range(2):  # the second is not stored, but is a step of the path all the same
        with run(data_id=[step, step + 1]):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with run.query(data_id=["q"]):
        F.cross_entropy(model(x[:1]), y[:1]).backward()
    run.finalize()
    assert [[b.data_id for b in s.blocks] for s in run.training_path.steps] == [[(0, 1)], [(1, 2)]]


def test_steps_that_a_scaler_skips_are_no_steps(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run = logix.init("run", model, root=str(tmp_path), record="path", optimizer=optimizer, verbose=False)
    x, y = batch_of([0, 1])
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        with run(data_id=[0, 1], scaler=scaler):
            scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    run.finalize()
    assert [[b.weight for b in s.blocks] for s in run.training_path.steps] == [[0.5], [0.5]]


def test_a_resumed_training_takes_the_place_of_what_it_repeats(tmp_path: Path) -> None:
    train(tmp_path, steps=4)
    run, model, optimizer = resumed_at_two(tmp_path)
    x, y = batch_of([7])
    with run(data_id=[7]):
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    run.finalize()
    steps = run.training_path.steps
    assert [s.step for s in steps] == [0, 1, 2]
    assert steps[-1].blocks[0].data_id == (7,) and steps[-1].settings[0]["lr"] == 0.3


def test_a_torn_line_is_dropped_and_a_changed_one_is_found(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=4)
    store, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(store, copy)
    (file,) = journals(store)
    file.write_bytes(file.read_bytes()[:-10])
    assert len(logix.open_store(store).training_path.steps) == len(path.steps) - 1
    (file,) = journals(copy)
    file.write_bytes(file.read_bytes().replace(b'"step":2', b'"step":3'))
    with pytest.raises(StoreDamagedError, match="line 4: the record is damaged"):
        _ = logix.open_store(copy).training_path
    assert [d.file for d in verify(copy).damages] == [file]


def test_a_last_line_whose_end_is_changed_is_found(tmp_path: Path) -> None:
    """It is no torn one, whose step was never recorded."""
    train(tmp_path, steps=4)
    (file,) = journals(tmp_path / "run")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreDamagedError, match=r"its end is no end of a line; restore"):
        _ = logix.open_store(tmp_path / "run").training_path
    assert [damage.file for damage in verify(tmp_path / "run").damages] == [file]


def test_nothing_follows_a_line_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be there in part: a line behind it would make the whole path unreadable."""
    store = create_store(tmp_path / "s", {})
    journal = PathJournal(store, 1, "SGD", [["a"]], Ranks(), 0)
    steps = [PathStep(number, 0, (), ({"lr": 0.1},)) for number in range(3)]
    journal.append(steps[0])
    with monkeypatch.context() as patch, pytest.raises(StoreWriteError, match="could not be recorded"):
        patch.setattr(local, "os", BrokenDisk(1))
        journal.append(steps[1])
    with pytest.raises(StoreWriteError, match="the record is closed"):
        journal.append(steps[2])
    found = read_journal(store / "path/1.jsonl")
    assert found is not None and found[1] == steps[:1] and verify(store).ok


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(ConfigError, match=r"record: path .* give init\(optimizer=...\)"):
        logix.init("run", model, root=str(tmp_path), record="path")
    with pytest.raises(ConfigError, match=r"at_steps counts optimizer steps"):
        logix.init("run", model, root=str(tmp_path), checkpoints={"at_steps": [3]})
    other = torch.optim.SGD([*model.parameters(), torch.zeros(3, requires_grad=True)], lr=0.1)
    with pytest.raises(CaptureError, match=r"a tensor of shape \(3,\) that is no parameter of the watched model"):
        logix.init("run", model, root=str(tmp_path), record="path", optimizer=other, verbose=False)


def test_a_store_without_a_path_says_so(tmp_path: Path) -> None:
    with logix.init("run", network(), root=str(tmp_path), verbose=False) as run:
        pass
    with pytest.raises(StoreError, match="holds no recorded path; train with 'record: path'"):
        _ = run.training_path


def test_the_path_of_another_model_is_refused(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=1)
    with pytest.raises(ModelMismatchError, match=r"has a parameter '0.weight', this one has none"):
        path.require_parameters({})
    shapes = dict.fromkeys(path.parameters, (1,))
    with pytest.raises(ModelMismatchError, match=r"shape \(1,\) in this model and \(8, 5\) on the path"):
        path.require_parameters(shapes)


def test_frozen_weights_given_to_the_optimizer_are_no_part_of_the_path(tmp_path: Path) -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=0.1)
    run = logix.init("run", model, root=str(tmp_path), record="path", optimizer=optimizer, verbose=False)
    for step in range(3):
        x, y = batch_of([step, step + 1])
        optimizer.zero_grad()
        with run(data_id=[step, step + 1]):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    run.finalize()
    path = run.training_path
    assert path.groups == (("2.weight", "2.bias"),)
    scores = ExactUnrolling(path, network(), OBJECTIVE, batch_of).scores(queries())  # refused if it led elsewhere
    assert scores.shape == (4, 4) and bool(scores.any())


def test_checkpoints_of_steps_that_were_taken_again_are_no_part_of_the_path(tmp_path: Path) -> None:
    before, _ = train(tmp_path, steps=5, checkpoints={"every_steps": 1})
    (other,) = (c.read().weights for c in before.checkpoints if c.step == 3)
    run, model, optimizer = resumed_at_two(tmp_path)
    model.load_state_dict(other)
    for ids in ([7], [8]):
        x, y = batch_of(ids)
        optimizer.zero_grad()
        with run(data_id=ids):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    run.finalize()
    path = run.training_path
    assert [c.step for c in path.checkpoints] == [0, 1, 2, 4]
    assert torch.equal(path.checkpoints[-1].read().weights["0.weight"], model[0].weight.detach())


def test_groups_that_came_later_are_named(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    run = logix.init("run", model, root=str(tmp_path), record="path", optimizer=optimizer, verbose=False)
    for step in range(2):
        x, y = batch_of([step])
        with run(data_id=[step]):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if not step:
            optimizer.add_param_group({"params": list(model[0].parameters())})
    run.finalize()
    for estimator in (TracInCP, ExactUnrolling):
        with pytest.raises(StoreError, match=r"at step 1 the optimizer had other parameter groups .* \(1 are recorded"):
            estimator(run.training_path, network(), OBJECTIVE, batch_of)
