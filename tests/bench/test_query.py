"""Bars B8 to B11 and the cost against N; ``python -m pytest tests/bench/test_query.py -s`` prints the table.

``LOGIX_BENCH_ROWS=1000000`` takes that many rows for B9 (8.2 GB on disk); the default is 200,000. Both sides of a
ratio run in one process, in turn. The processor decides which arithmetic wins, so the floor of B8 is also shown for
float32 products of widened pieces.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from logix_like.query.engine import QueryEngine
from logix_like.store import GradientStore
from tests.bench import w1
from tests.bench.memory import resident
from tests.bench.synthetic import make_store, queries

WIDTH = 4096
ROWS = 100_000
LARGE = int(os.environ.get("LOGIX_BENCH_ROWS", 200_000))
OPTIONS = {"preconditioner": "identity", "k": 10, "progress": False}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GradientStore:
    return make_store(tmp_path_factory.mktemp("b8") / "store", ROWS, WIDTH)


def show(line: object) -> None:
    sys.stdout.write(f"\n{line}")


def floor(store: GradientStore, asked: Tensor) -> Callable[[], None]:
    """Mapping the store's chunks and multiplying them as they are, nothing else."""
    narrow = asked.to(torch.bfloat16)

    def multiply() -> None:
        for chunk in store.chunks():
            torch.mm(chunk.raw, narrow.T)

    return multiply


def floor_of_pieces(store: GradientStore, asked: Tensor) -> Callable[[], None]:
    """The same with rows widened to float32, in pieces that stay in the caches."""
    piece = torch.empty(128, WIDTH)

    def multiply() -> None:
        for chunk in store.chunks():
            for rows in chunk.raw.split(len(piece)):
                torch.mm(piece[: len(rows)].copy_(rows), asked.T)

    return multiply


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [1, 8, 64])
def test_b8_exact_scan(store: GradientStore, count: int) -> None:
    query = queries(WIDTH, count)
    ask = partial(QueryEngine(store).influence, query, **OPTIONS)
    for name, other in (("bfloat16", floor), ("pieces in float32", floor_of_pieces)):
        ratio = w1.compare(
            f"B8 {count} queries x {ROWS:,}: map + {name} product / query", other(store, query.gradients), ask, pairs=7
        )
        show(ratio)
        show(f"   {count * ROWS / ratio.other / 1e6:.1f} M pairs/s")


@pytest.mark.timeout(3600)
def test_b9_larger_than_memory_likes(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LARGE, WIDTH)
    try:
        for count in (8, 64):
            engine, query = QueryEngine(store), queries(WIDTH, count)
            peaks: list[int] = []
            before = resident()
            engine.influence(query, **OPTIONS)  # checksums are compared once
            start = time.perf_counter()
            with _watched(peaks):
                engine.influence(query, **OPTIONS)
            took = time.perf_counter() - start
            show(
                f"B9 {count} queries x {LARGE:,}: {took:.2f} s, {count * LARGE / took / 1e6:.1f} M pairs/s, "
                f"memory growth {(max(peaks) - before) / 2**20:.0f} MiB"
            )
            assert max(peaks) - before < 2**30
    finally:
        for file in (tmp_path / "store").rglob("c.*"):
            file.unlink()


@pytest.mark.timeout(1800)
def test_cost_grows_with_the_rows(tmp_path: Path) -> None:
    query = queries(1024, 8)
    for rows in (10_000, 100_000, 1_000_000):
        store = make_store(tmp_path / str(rows), rows, 1024)
        engine = QueryEngine(store)
        engine.influence(query, **OPTIONS)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            engine.influence(query, **OPTIONS)
            times.append(time.perf_counter() - start)
        show(f"cost: 8 queries x {rows:>9,} x 1,024: {sorted(times)[1] * 1e3:9.1f} ms")
        for file in (tmp_path / str(rows)).rglob("c.*"):
            file.unlink()


class _watched:
    """Notes this process's memory every few milliseconds."""

    def __init__(self, seen: list[int]) -> None:
        import threading

        self._seen, self._stop = seen, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._seen.append(resident())

    def __enter__(self) -> None:
        self._seen.append(resident())
        self._thread.start()

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()
