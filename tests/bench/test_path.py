"""Bar B16 on workload W1: what recording the path and tracking queries cost; ``pytest tests/bench/test_path.py -s``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

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
    """A step with its path recorded, plus a twentieth of the queries' gradients (every 20 steps, the default)."""
    make = getattr(torch.optim, optimizer)
    network, other = w1.model(), w1.model()
    ours, plain = (make(m.parameters(), lr=1e-4) for m in (network, other))
    config = {**w1.CONFIG, "record": "path"}
    run = logix.init("b16", network, config, root=str(tmp_path), optimizer=ours, verbose=False)
    tokens = w1.forever(w1.batches())

    def logged() -> None:
        number, batch = next(tokens)
        ours.zero_grad()
        with run(data_id=range(number * w1.BATCH, (number + 1) * w1.BATCH)):
            w1.loss(network, batch).backward()
        ours.step()

    def bare() -> None:
        _, batch = next(tokens)
        plain.zero_grad()
        w1.loss(other, batch).backward()
        plain.step()

    logged()
    live = run.track(w1.batches()[-1], w1.loss, every=10**6)
    step = w1.compare(f"B16 a step with its path recorded / plain, {optimizer}", logged, bare, pairs=12, warmup=2)
    turn = w1.compare(
        f"B16 gradients of 8 queries / plain step, {optimizer}", live._query_gradients, bare, pairs=5, warmup=1
    )
    run.finalize()
    total = step.quartiles[1] + turn.quartiles[1] / 20
    sys.stdout.write(f"\n{step}\n{turn}\nB16 together, queries every 20 steps: {total:.3f}")
    assert total <= 1.15
