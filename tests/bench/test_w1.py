"""Bars B1 to B5 on workload W1; ``python -m pytest tests/bench -s`` prints the table.

Both sides of a ratio run in one process, in turn, and medians are shown. The bars are asserted, so a run on a busy
machine may fail where a quiet one passes: look at the quartiles.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logix_like as logix
from logix_like.capture.recorder import CallReader
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.run.block import Block
from logix_like.run.run import Run
from logix_like.weights import frozen
from tests.bench import w1

ROOT = Path(__file__).parents[2]
OURS: list[tuple[type, str]] = [
    (CallReader, "__call__"), (CallReader, "_gradient"), (Block, "__enter__"), (Block, "__exit__"), (Run, "__call__"),
]  # fmt: skip
"""Where the training thread enters our code."""


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def logged_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W1 logged once, all 512 sequences."""
    root = tmp_path_factory.mktemp("w1")
    network = w1.model()
    with logix.init("store", network, w1.CONFIG, root=str(root), verbose=False) as run:
        for number, tokens in enumerate(w1.batches()):
            network.zero_grad()
            with run(data_id=range(number * w1.BATCH, (number + 1) * w1.BATCH)):
                w1.loss(network, tokens).backward()
    return root / "store"


def show(line: object) -> None:
    sys.stdout.write(f"\n{line}")


@pytest.mark.timeout(900)
def test_b1_a_logged_step(tmp_path: Path) -> None:
    network, tokens = w1.model(), w1.forever(w1.batches())
    run = logix.init("b1", network, w1.CONFIG, root=str(tmp_path), verbose=False)

    def logged() -> None:
        number, batch = next(tokens)
        network.zero_grad()
        with run(data_id=range(number * w1.BATCH, (number + 1) * w1.BATCH)):
            w1.loss(network, batch).backward()

    def plain() -> None:
        _, batch = next(tokens)
        network.zero_grad()
        w1.loss(network, batch).backward()

    ratio = w1.compare("B1 logged step (covariance, store) / plain step", logged, plain, pairs=40)
    run.finalize()
    show(ratio)
    assert len(run.store) == 43 * w1.BATCH
    assert ratio.quartiles[1] <= 1.05


@pytest.mark.timeout(900)
@pytest.mark.parametrize("statistics", [["covariance"], ["covariance", "kronecker"]], ids="+".join)
def test_b1_time_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistics: list[str]) -> None:
    """What the training thread spends in our code, clocked there: less noisy than a difference of whole steps."""
    spent = [0.0]
    for owner, name in OURS:
        monkeypatch.setattr(owner, name, clocked(getattr(owner, name), spent))
    network, ours, others = w1.model(), [], []
    settings = {**w1.CONFIG, "statistics": statistics, "root": str(tmp_path)}
    with logix.init("inside", network, settings, verbose=False) as run:
        for number, tokens in enumerate(w1.batches()[:27]):
            spent[0], start = 0.0, time.perf_counter()
            network.zero_grad()
            with run(data_id=range(number * w1.BATCH, (number + 1) * w1.BATCH)):
                w1.loss(network, tokens).backward()
            ours.append(spent[0])
            others.append(time.perf_counter() - start - spent[0])
    show(w1.ratio_of(f"B1 inside our code ({' and '.join(statistics)}) / rest of the step", ours[3:], others[3:]))


def clocked(act: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    @functools.wraps(act)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return act(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - start

    return timed


@pytest.mark.timeout(900)
def test_b2_extraction(tmp_path: Path) -> None:
    """Also against the floor: the same pass with frozen weights and nothing of ours, which no tool can undercut."""
    network, other, bare = w1.model(), w1.model(), w1.model()
    tokens = w1.batches()
    run = logix.init("b2", network, w1.CONFIG, root=str(tmp_path), verbose=False)
    bare.model.embed_tokens.register_forward_hook(lambda module, args, out: out.detach().requires_grad_().clone())
    ours: list[float] = []
    theirs: list[float] = []
    floor: list[float] = []

    def timed(times: list[float], model: nn.Module, batch: Tensor) -> None:
        start = time.perf_counter()
        model.zero_grad()
        w1.loss(model, batch).backward()
        times.append(time.perf_counter() - start)

    def loader() -> Iterator[Tensor]:
        for batch in tokens[:40]:
            start = time.perf_counter()
            yield batch
            ours.append(time.perf_counter() - start)
            timed(theirs, other, batch)
            timed(floor, bare, batch)

    with frozen(bare):
        run.extract(loader(), w1.loss, progress=False)
    run.finalize()
    show(w1.ratio_of("B2 extract step / plain step (goal .78)", ours[3:], theirs[3:]))
    show(w1.ratio_of("B2 frozen step without hooks / plain step: the floor here", floor[3:], theirs[3:]))
    above = w1.ratio_of("B2 extract step / that floor", ours[3:], floor[3:])
    show(above)
    assert above.quartiles[1] <= 1.05


@pytest.mark.timeout(900)
def test_b3_memory(tmp_path: Path) -> None:
    measured = {}
    for kind in ("plain", "logged"):
        command = [sys.executable, "-m", "tests.bench.memory", kind, str(tmp_path / kind)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
        measured[kind] = json.loads(output)
    above = (measured["logged"]["peak"] - measured["plain"]["peak"]) / 2**20
    growth = measured["logged"]["growth"] - measured["plain"]["growth"]
    show(f"B3 peak memory above the plain loop: {above:.1f} MiB; growth per logged sample: {growth:,.0f} bytes")
    assert above <= 64
    assert growth <= 2 * 7168 * 2


def test_b4_bytes_on_disk(logged_store: Path) -> None:
    store = logix.open_store(logged_store)
    rows = sum(size for kind, size in store.bytes.items() if kind in ("rows", "columns", "commits"))
    others = {kind: size for kind, size in store.bytes.items() if kind not in ("rows", "columns", "commits")}
    show(f"B4 bytes a sample: {rows / len(store):,.0f} (rows, columns, commit records); others in all: {others}")
    assert len(store) == w1.SEQUENCES
    assert rows / len(store) <= 14_500


def test_b5_a_query(logged_store: Path) -> None:
    store = logix.open_store(logged_store)
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(8, store.layout.width, generator=generator)
    query = QueryGradients(tuple(range(8)), queries, store.layout)
    engine = QueryEngine(store)
    rows = store.gradients[:]

    def product() -> Tensor:
        return rows @ queries.T

    ratios = {
        k: w1.compare(f"B5 product in memory / query (k={k})", product, partial(engine.influence, query, k=k), pairs=60)
        for k in (None, 10)
    }
    for ratio in ratios.values():
        show(ratio)
    assert ratios[None].quartiles[1] >= 0.5  # the first ten are those of products in float64, which take longer
