"""Bar B16 on workload W1: what recording the path and tracking queries cost; ``pytest tests/bench/test_path.py -s``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import logix_like as logix
from tests.bench import w1


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_b16_a_tracked_step(tmp_path: Path, optimizer: str) -> None:
    """Steps are compared in rounds of 20, one of which takes the queries' gradients."""
    make = getattr(torch.optim, optimizer)
    network, other = w1.model(), w1.model()
    ours, plain = (make(m.parameters(), lr=1e-4) for m in (network, other))
    config = {**w1.CONFIG, "record": "path"}
    run = logix.init("b16", network, config, root=str(tmp_path), optimizer=ours, verbose=False)
    tokens = w1.forever(w1.batches())

    def step(model: Any, taker: torch.optim.Optimizer, *, log: bool) -> None:
        number, batch = next(tokens)
        taker.zero_grad()
        if log:
            with run(data_id=range(number * w1.BATCH, (number + 1) * w1.BATCH)):
                w1.loss(model, batch).backward()
        else:
            w1.loss(model, batch).backward()
        taker.step()

    def tracked() -> None:
        for _ in range(20):
            step(network, ours, log=True)

    def bare() -> None:
        for _ in range(20):
            step(other, plain, log=False)

    step(network, ours, log=True)
    live = run.track(w1.batches()[-1], w1.loss)
    ratio = w1.compare(
        f"B16 20 steps with path and 8 tracked queries / plain, {optimizer}", tracked, bare, pairs=4, warmup=1
    )
    run.finalize()
    sys.stdout.write(f"\n{ratio}")
    assert live.scores.shape[0] == 8 and bool(live.scores.any())
    assert ratio.quartiles[1] <= 1.15
