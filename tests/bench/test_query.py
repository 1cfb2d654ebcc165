"""Bars B8 to B11 and the cost against N; ``python -m pytest tests/bench/test_query.py -s`` prints the table.

``LOGIX_BENCH_ROWS=1000000`` takes that many rows for B9 (8.2 GB on disk); the default is 200,000. Both sides of a
ratio run in one process, in turn. The processor decides which arithmetic wins, so the floor of B8 is also shown for
float32 products of widened pieces. ``LOGIX_BENCH_THREADS=1`` is the steadier on a machine that others use too.
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
from logix_like.query.gradients import QueryGradients
from logix_like.query.result import InfluenceResult
from logix_like.store import GradientStore
from tests.bench import w1
from tests.bench.memory import resident
from tests.bench.synthetic import make_store, queries
from tests.bench.trained import make as make_trained

WIDTH = 4096
ROWS = int(os.environ.get("LOGIX_BENCH_B8_ROWS", 100_000))
LARGE = int(os.environ.get("LOGIX_BENCH_ROWS", 200_000))
OPTIONS = {"preconditioner": "identity", "k": 10, "progress": False}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("LOGIX_BENCH_THREADS", 2)))
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
    piece = torch.empty(128, asked.shape[1])

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
            with Watched(peaks):
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


class Watched:
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


INDEXED = int(os.environ.get("LOGIX_BENCH_B10_ROWS", 10_000))


@pytest.mark.timeout(3600)
def test_b10_index_and_exact_ranking() -> None:
    """Against the exact float32 scan (rows widened, nothing else); recall against float64 on the stored rows."""
    run, query = make_trained(INDEXED, 64)
    store, engine = run.store, QueryEngine(run.store, keep_bytes=0)
    truth = _truth(store, engine.preconditioned(query), 10)
    exact = engine.influence(query, k=10, progress=False)
    show(f"B10 {INDEXED:,} rows of a trained language model; exact engine: recall@10 {_recall(exact, truth):.3f}")
    start = time.perf_counter()
    first = engine.influence(_some(query, 0, 1), k=10, engine="faiss", progress=False)
    show(f"B10 index: first answer after {time.perf_counter() - start:.1f} s\n   {first.note}")
    alone = [
        _recall(engine.influence(_some(query, q, q + 1), k=10, engine="faiss", progress=False), truth[q::64])
        for q in range(64)
    ]
    recall = sum(alone) / len(alone)
    show(f"B10 index: recall@10 of {len(alone)} queries, each asked by itself: {recall:.3f}")
    for count in (1, 64):
        some = _some(query, 0, count)
        asked = engine.preconditioned(some)
        ask = partial(engine.influence, some, k=10, engine="faiss", progress=False)
        ratio = w1.compare(f"B10 {count} queries: float32 scan / index", floor_of_pieces(store, asked), ask, pairs=7)
        show(ratio)
        show(f"   {ask().note}")
    assert _recall(exact, truth) == 1.0
    assert recall >= 0.98


def _some(query: QueryGradients, start: int, stop: int) -> QueryGradients:
    return QueryGradients(query.data_id[start:stop], query.gradients[start:stop], query.layout)


def _truth(store: GradientStore, asked: Tensor, k: int) -> list[set[object]]:
    scores = torch.cat([asked.double() @ chunk.decode().double().T for chunk in store.chunks()], 1)
    return [set(store.data_id[line].tolist()) for side in (scores, -scores) for line in side.topk(k, 1).indices]


def _recall(result: InfluenceResult, truth: list[set[object]]) -> float:
    found = [set(line) for side in (result.proponents(), result.opponents()) for line in side.ids.tolist()]
    shares = [len(a & b) / len(b) for a, b in zip(found, truth, strict=True)]
    return sum(shares) / len(shares)


@pytest.mark.timeout(3600)
def test_b11_dask(tmp_path: Path) -> None:
    """Two workers of one thread against the exact engine on the same two cores."""
    dask = pytest.importorskip("distributed")
    store = make_store(tmp_path / "store", LARGE, WIDTH)
    query = queries(WIDTH, 8)
    with (
        dask.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        dask.Client(cluster) as client,
    ):
        ask = partial(QueryEngine(store).influence, query, **OPTIONS)
        on_dask = partial(QueryEngine(store).influence, query, engine="dask", client=client, **OPTIONS)
        one, other = ask(), on_dask()
        for a, b in ((one.proponents(), other.proponents()), (one.opponents(), other.opponents())):
            assert a.ids.tolist() == b.ids.tolist() and a.scores.equal(b.scores)
        show(w1.compare(f"B11 8 queries x {LARGE:,}: Dask / exact", on_dask, ask, pairs=5, warmup=1))
    for file in (tmp_path / "store").rglob("c.*"):
        file.unlink()
