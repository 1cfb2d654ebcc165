"""Mixed precision, loss scaling and clipping in a bare loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logix_like as logix
from logix_like.errors import StoreError
from logix_like.store import Flag
from tests.training import SAMPLES, batches, data, full, network, own_gradients

FEW_BITS = {torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Relative error of gradients whose factors keep 8 or 11 bits."""
ROUNDING = 1e-5


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", FEW_BITS, ids=str)
def test_autocast(tmp_path: Path, dtype: torch.dtype) -> None:
    model, (x, y) = network(torch.float32), data(torch.float32)
    run = logix.init("run", model, full(tmp_path), verbose=False)
    for index in batches():
        with run(data_id=index):
            with torch.autocast("cpu", dtype=dtype):
                loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
    run.finalize()
    assert relative(run.store.gradients[:], own_gradients(network(), *data())) < FEW_BITS[dtype]


def test_rows_are_taken_before_clipping(tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    expected = own_gradients(model, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = logix.init("run", model, full(tmp_path), optimizer=optimizer, verbose=False)
    for index in batches():
        with run(data_id=index):
            F.cross_entropy(model(x[index]), y[index]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
        optimizer.step()
        optimizer.zero_grad()
    run.finalize()
    assert relative(run.store.gradients[:], expected) < ROUNDING


def scaled_run(
    root: Path,
    spoiled: int,
    accumulate: int,
    *,
    optimizer_known: bool = True,
    fused: bool = False,
    record: str = "none",
) -> logix.GradientStore:
    """A loop with a gradient scaler in which the batch number ``spoiled`` overflows."""
    model, (x, y) = network(torch.float32), data(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    known = optimizer if optimizer_known else None
    settings = full(root, statistics=["covariance", "kronecker"], store={"dtype": "float32"}, record=record)
    run = logix.init("run", model, settings, optimizer=known, verbose=False)
    for number, index in enumerate(batches()):
        with run(data_id=index, scaler=scaler, scale=1 / accumulate):
            loss = F.cross_entropy(model(x[index]), y[index], reduction="none")
            if number == spoiled:
                loss = loss * torch.tensor([1.0, torch.inf, *[1.0] * (len(index) - 2)])
            scaler.scale(loss.mean() / accumulate).backward()
        if (number + 1) % accumulate == 0 or number == 4:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    run.finalize()
    return run.store


def flagged(store: logix.GradientStore) -> list[int]:
    return [int(i) for i in store.data_id[(store.flags & int(Flag.OVERFLOW)) != 0]]


@pytest.mark.parametrize("fused", [False, True])
def test_the_batch_of_a_skipped_step_is_flagged_and_does_not_count(tmp_path: Path, fused: bool) -> None:
    store = scaled_run(tmp_path, spoiled=2, accumulate=1, fused=fused)
    assert flagged(store) == [10, 11, 12, 13, 14]
    assert list(store.step[::5]) == [0, 1, 2, 2, 3]  # the skipped step was none
    assert list(store.data_id[store.valid]) == [i for i in range(SAMPLES) if i not in range(10, 15)]
    assert store.statistics.rows == SAMPLES
    assert store.statistics.covariance("0").isfinite().all()
    expected = own_gradients(network(), *data())
    assert relative(store.gradients[store.valid], expected[torch.from_numpy(store.valid)]) < ROUNDING


def test_all_batches_that_were_accumulated_for_a_skipped_step_are_flagged(tmp_path: Path) -> None:
    assert flagged(scaled_run(tmp_path, spoiled=3, accumulate=2)) == list(range(10, 20))
    assert flagged(scaled_run(tmp_path / "first", spoiled=2, accumulate=2)) == list(range(10, 20))


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_no_part_of_the_path(tmp_path: Path, fused: bool) -> None:
    path = scaled_run(tmp_path, spoiled=2, accumulate=1, fused=fused, record="path").training_path
    assert [(step.step, step.blocks[0].data_id[0]) for step in path.steps] == [(0, 0), (1, 5), (2, 15), (3, 20)]


def test_without_an_optimizer_only_the_batch_itself_is_known(tmp_path: Path) -> None:
    assert flagged(scaled_run(tmp_path, spoiled=2, accumulate=1, optimizer_known=False)) == list(range(10, 15))


def test_a_commit_holds_a_step_back_that_may_still_be_skipped(tmp_path: Path) -> None:
    model, (x, y) = network(torch.float32), data(torch.float32)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    run = logix.init("run", model, full(tmp_path), optimizer=optimizer, verbose=False)

    def accumulate(index: range, factor: float = 1.0) -> None:
        with run(data_id=index, scaler=scaler, scale=0.5):
            scaler.scale(factor * F.cross_entropy(model(x[index]), y[index]) / 2).backward()
        run.commit()

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.commit()

    accumulate(range(5))
    assert len(run.store) == 0
    with pytest.raises(StoreError, match="in the midst of an optimizer step"):
        run.forget([1])
    accumulate(range(5, 10), torch.inf)
    step()
    assert flagged(run.store) == list(range(10))
    accumulate(range(10, 15))
    step()
    assert len(run.store) == 15
    assert run.forget([12]) == 1
    run.finalize()
    assert flagged(run.store) == list(range(10))
