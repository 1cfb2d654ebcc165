"""Compiled models: rows are right, and logging makes nothing compile again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from logix_like.capture.eager import eager
from tests.training import SAMPLES, batches, data, full, network, own_gradients

EXACT = 1e-9

# Torch's compiler itself looks at .grad of what a compiled region hands to the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def whole(model: nn.Module, backend: str) -> nn.Module:
    return cast(nn.Module, torch.compile(model, backend=backend))


def in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def regional(model: nn.Module, backend: str) -> nn.Module:
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(*(whole(part, backend) for part in model))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def log_between_compiled_steps(root: Path, compiled: nn.Module) -> tuple[logix.Run, int]:
    """Log every batch; before and after each block the compiled model is used. Returns the compilations inside."""
    x, y = data()
    for index in (*batches(), *batches()):  # both sizes of batch
        F.cross_entropy(compiled(x[index]), y[index]).backward()
    compiled.zero_grad()
    before = compilations()
    assert before
    run = logix.init("run", compiled, full(root), verbose=False)
    for index in batches():
        with run(data_id=index):
            F.cross_entropy(compiled(x[index]), y[index]).backward()
        F.cross_entropy(compiled(x[index]), y[index]).backward()
    run.finalize()
    return run, compilations() - before


@pytest.mark.parametrize("wrap", [whole, in_place, regional])
def test_rows_and_no_recompilation(tmp_path: Path, wrap: Callable[[nn.Module, str], nn.Module]) -> None:
    run, again = log_between_compiled_steps(tmp_path, wrap(network(), "aot_eager"))
    assert again == 0
    expected = own_gradients(network(), *data())
    rows = run.store.gradients[:]
    assert float((rows - expected).norm() / expected.norm()) < EXACT
    assert run.store.modules.names == ("0", "2")


def test_the_plain_model_reads_the_store_of_a_compiled_one(tmp_path: Path) -> None:
    run, _ = log_between_compiled_steps(tmp_path, whole(network(), "aot_eager"))
    x, y = data()
    loaded = logix.load(tmp_path / "run", model=network())
    with loaded.query(data_id=["q"]) as query:  # the same weights: nothing is warned of
        F.cross_entropy(loaded_model(loaded)(x[:1]), y[:1]).backward()
    assert loaded.compute_influence_all(query).scores.shape == (1, SAMPLES)
    assert len(run.store) == SAMPLES


def loaded_model(run: logix.Run) -> nn.Module:
    return run._logbook.tracker.model


def test_a_step_first_compiled_behind_a_block_is_still_compiled(tmp_path: Path) -> None:
    x, y = data()
    compiled = whole(network(), "aot_eager")
    run = logix.init("run", compiled, full(tmp_path), verbose=False)
    with run(data_id=range(SAMPLES)):
        F.cross_entropy(compiled(x), y).backward()
    before = compilations()
    compiled(x)
    assert compilations() == before + 1
    run.finalize()


class WithLoss(nn.Module):
    """The loss is computed inside the compiled region."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


def test_a_loss_inside_the_compiled_region(tmp_path: Path) -> None:
    model, (x, y) = WithLoss(), data()
    compiled = whole(model, "aot_eager")
    compiled(x, y).backward()
    compiled.zero_grad()
    before = compilations()
    run = logix.init("run", compiled, full(tmp_path), verbose=False)
    with run(data_id=range(SAMPLES)):
        compiled(x, y).backward()
    compiled(x, y).backward()
    run.finalize()
    assert compilations() == before
    expected = own_gradients(network(), x, y)
    assert float((run.store.gradients[:] - expected).norm() / expected.norm()) < EXACT


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler")
@pytest.mark.parametrize("wrap", [whole, in_place, regional])
def test_rows_and_no_recompilation_by_inductor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Callable[[nn.Module, str], nn.Module]
) -> None:
    from torch._inductor import config as inductor_config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    with inductor_config.patch(compile_threads=1):  # no pool of processes that outlives the test
        run, again = log_between_compiled_steps(tmp_path, wrap(network(), "inductor"))
    assert again == 0
    expected = own_gradients(network(), *data())
    assert float((run.store.gradients[:] - expected).norm() / expected.norm()) < EXACT


def test_those_who_want_eager_steps_end_in_any_order() -> None:
    compiled = torch.compile(nn.Linear(3, 2), backend="aot_eager")
    first, second, forgotten = eager(), eager(), eager()
    for one in (first, second, forgotten):
        one.__enter__()
    first.__exit__(None, None, None)
    del forgotten, one
    before = compilations()
    compiled(torch.ones(1, 3))
    assert compilations() == before
    second.__exit__(None, None, None)
    compiled(torch.ones(1, 3))
    assert compilations() == before + 1
