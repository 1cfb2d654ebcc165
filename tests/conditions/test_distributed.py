"""Two processes under torchrun (gloo, CPU): their store is the one that a single process writes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import logix_like as logix
from logix_like.errors import ConfigError, StoreError
from logix_like.estimators import ExactUnrolling
from logix_like.objective import Objective
from logix_like.ranks import Ranks
from logix_like.store.format.journal import journals
from logix_like.store.format.schema import Flag
from tests.conditions.ranks_script import SIZE, shares
from tests.training import SAMPLES, data, full, network

ROOT = Path(__file__).parents[2]
REORDERED = 1e-9
"""The processes' gradients are summed in another order than a single process's."""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests" / "conditions" / "ranks_script.py")
    return subprocess.run(
        [*command, script, *arguments], env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def single_process(root: Path, **config: Any) -> logix.GradientStore:
    """The same training: each step's gradient is the mean of the processes' means."""
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = logix.init("run", model, full(root, **config), optimizer=optimizer, verbose=False)
    for epoch in range(2):
        run.epoch(epoch)
        for indices in zip(*map(shares, range(SIZE)), strict=True):
            for index in indices:
                with run(data_id=index, scale=1 / SIZE):
                    (F.cross_entropy(model(x[index]), y[index]) / SIZE).backward()
            optimizer.step()
            optimizer.zero_grad()
    run.finalize()
    return run.store


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores ``ddp/run`` and ``fsdp/run`` of the same training, and ``scaled/run`` of another one."""
    root = tmp_path_factory.mktemp("ranks")
    ended = torchrun(str(root), "ddp", "fsdp", "scaled")
    assert ended.returncode == 0, ended.stderr
    assert "do not add up" not in ended.stderr  # averaged gradients are no sums of one process's rows
    return root


@pytest.mark.timeout(500)
@pytest.mark.parametrize("wrapping", ["ddp", "fsdp"])
def test_the_merged_store_is_that_of_one_process(tmp_path: Path, two_processes: Path, wrapping: str) -> None:
    expected, model = single_process(tmp_path), network()
    run = logix.load(two_processes / wrapping / "run", model=model)  # plain: no wrapper's name is in the store
    found = run.store
    assert [writer.rank for writer in found.writers] == [0, 1]
    assert [writer.rows for writer in found.writers] == [24, 22]
    assert {writer.state for writer in found.writers} == {"closed"}
    order, reference = (np.lexsort((store.data_id.astype(int), store.epoch)) for store in (found, expected))
    for column in ("data_id", "step", "epoch", "lr"):
        assert list(getattr(found, column)[order]) == list(getattr(expected, column)[reference]), column
    rows, wanted = found.gradients[order], expected.gradients[reference]
    assert float((rows - wanted).norm() / wanted.norm()) < REORDERED
    assert len(found.view("mean")) == SAMPLES
    assert_same_statistics(found, expected)
    assert_answers(run, expected)


def assert_same_statistics(found: logix.GradientStore, expected: logix.GradientStore) -> None:
    assert found.statistics.rows == expected.statistics.rows == 2 * SAMPLES
    assert found.layout == expected.layout
    for name in ("0", "2"):
        ours, theirs = (store.statistics.covariance(name) for store in (found, expected))
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12)


def assert_answers(run: logix.Run, expected: logix.GradientStore) -> None:
    x, y = data()
    assert len(run.store.checkpoints) == 3  # where the path begins, and after each epoch
    for model in run.at_checkpoints("last"):
        with run.query(data_id=["q"]) as query:
            F.cross_entropy(model(x[:1]), y[:1]).backward()
    scores = run.compute_influence_all(query)
    assert scores.scores.shape == (1, SAMPLES)


def test_a_step_that_one_part_of_the_gradient_spoils_is_flagged_in_all_processes(two_processes: Path) -> None:
    store = logix.open_store(two_processes / "scaled" / "run")
    assert sorted(store.data_id[(store.flags & Flag.OVERFLOW) != 0]) == ["0-1", "1-1"]
    assert sorted(store.data_id[store.valid]) == [f"{rank}-{step}" for rank in range(2) for step in (0, 2, 3)]


@pytest.mark.parametrize("wrapping", ["ddp", "fsdp"])
def test_the_path_holds_what_all_processes_used(tmp_path: Path, two_processes: Path, wrapping: str) -> None:
    """Its replay ends at the recorded weights, so that samples and weights are those of the training."""
    found = logix.open_store(two_processes / wrapping / "run").training_path
    expected = single_process(tmp_path, record="path").training_path
    assert (found.steps, found.optimizer, found.groups) == (expected.steps, expected.optimizer, expected.groups)
    x, y = data()

    def batch_of(ids: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return x[list(ids)], y[list(ids)]

    scores, wanted = (
        ExactUnrolling(path, network(), Objective(), batch_of).scores((x[:2], y[:2])) for path in (found, expected)
    )
    torch.testing.assert_close(scores, wanted, rtol=REORDERED, atol=1e-12)


def test_a_step_that_one_process_did_not_write_is_no_step(two_processes: Path, tmp_path: Path) -> None:
    store = tmp_path / "run"
    shutil.copytree(two_processes / "ddp" / "run", store)
    first, second = journals(store)
    assert [file.name for file in (first, second)] == ["1-0.jsonl", "1-1.jsonl"]
    second.write_bytes(second.read_bytes()[:-10])
    assert len(logix.open_store(store).training_path.steps) == 5
    second.unlink()
    with pytest.raises(StoreError, match="holds no recorded path"):
        _ = logix.open_store(store).training_path


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_killed_process_leaves_a_store_that_opens(tmp_path: Path) -> None:
    ended = torchrun(str(tmp_path), "killed")
    assert ended.returncode != 0
    store = logix.open_store(tmp_path / "killed" / "run")
    committed = [int(i) for rank in range(SIZE) for index in list(shares(rank))[:2] for i in index]
    assert list(store.data_id[: len(committed)]) == committed
    assert store.valid.all()


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_process_that_raises_waits_for_no_other(tmp_path: Path) -> None:
    """Else both would wait, one for gradients and one for the end of the run, until torch gives up."""
    ended = torchrun(str(tmp_path), "broken")
    assert ended.returncode != 0
    assert "RuntimeError: broken" in ended.stderr
    store = logix.open_store(tmp_path / "broken" / "run")
    assert set(store.data_id) >= {int(i) for index in list(shares(1))[:2] for i in index}
    assert store.valid.all()


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("on_error", ["raise", "stop_logging"])
def test_all_hear_soon_of_a_store_that_the_first_process_cannot_begin(tmp_path: Path, on_error: str) -> None:
    ended = torchrun(str(tmp_path), on_error)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stderr.splitlines()
    for rank in range(SIZE):
        (seconds,) = re.findall(rf"process {rank} ended after (\d+) s", ended.stderr)
        assert int(seconds) < 60
        raised = [line for line in lines if line.startswith(f"process {rank} raised")]
        assert len(raised) == (on_error == "raise")
    assert ended.stderr.count("training goes on") == (SIZE if on_error == "stop_logging" else 0)
    assert "process 0 of 2 could not begin the store, so that this one (process 1) writes nothing" in ended.stderr
    assert len(logix.open_store(tmp_path / on_error / "run")) == 0


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="init_process_group"):
        logix.init("run", network(), {"root": str(tmp_path)}, verbose=False)


def test_one_process_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Ranks.here() == Ranks(0, 1)
