"""Bars B8 to B11 and the cost against N; ``python -m pytest tests/bench/test_query.py -s`` prints them all.

At full size, a million rows (8.2 GB, made in a stream in the temporary folder and removed at the end) and 100,000 rows
of a trained model (kept there). ``LOGIX_BENCH_ROWS`` and ``LOGIX_BENCH_B10_ROWS`` take fewer. Both sides of a ratio
run in one process, in turn, and the bars are asserted. Which arithmetic wins depends on the processor, so the floor is
shown for both: products of rows as they are stored, and of rows widened to float32."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial

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
LARGE = int(os.environ.get("LOGIX_BENCH_ROWS", 1_000_000))
ROWS = LARGE // 10
INDEXED = int(os.environ.get("LOGIX_BENCH_B10_ROWS", 100_000))
CLOCK = time.process_time if "LOGIX_BENCH_CPU" in os.environ else time.perf_counter
OPTIONS = {"preconditioner": "identity", "k": 10, "progress": False}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if "LOGIX_BENCH_CPU" in os.environ else 2)
    yield
    torch.set_num_threads(before)


Stores = Callable[[int], GradientStore]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """Synthetic stores by their number of rows, each made once and removed at the end."""
    folder = tmp_path_factory.mktemp("synthetic")
    yield cache(lambda rows: make_store(folder / str(rows), rows, WIDTH))
    shutil.rmtree(folder)


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


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [1, 8, 64])
def test_b8_exact_scan(stores: Stores, count: int) -> None:
    store, query = stores(ROWS), queries(WIDTH, count)
    ask = partial(QueryEngine(store).influence, query, **OPTIONS)
    ratios = {}
    for name, other in (("bfloat16", floor), ("pieces in float32", floor_of_pieces)):
        ratios[name] = ratio = w1.compare(
            f"B8 {count} queries x {ROWS:,}: map + {name} product / query",
            other(store, query.gradients),
            ask,
            pairs=3,
            warmup=1,
            clock=CLOCK,
        )
        show(ratio)
        show(f"   {count * ROWS / ratio.other / 1e6:.1f} M pairs/s")
    assert count == 1 or ratios["bfloat16"].quartiles[1] >= 0.8


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [8, 64])
def test_b9_larger_than_memory_likes(stores: Stores, count: int) -> None:
    store, query = stores(LARGE), queries(WIDTH, count)
    ask = partial(QueryEngine(store).influence, query, **OPTIONS)
    ask()  # checksums are compared once
    with Watched() as memory:
        ratio = w1.compare(
            f"B9 {count} queries x {LARGE:,}: map + pieces in float32 product / query",
            floor_of_pieces(store, query.gradients),
            ask,
            pairs=2,
            warmup=0,
            clock=CLOCK,
        )
    show(ratio)
    growth, rate = memory.growth, count * LARGE / ratio.other
    show(f"   {rate / 1e6:.1f} M pairs/s, memory growth {growth / 2**20:.0f} MiB")
    assert growth < 2**30
    assert count == 8 or rate >= 4e6


@pytest.mark.timeout(3600)
def test_cost_grows_with_the_rows(stores: Stores) -> None:
    query = queries(WIDTH, 8)
    for rows in (LARGE // 100, LARGE // 10, LARGE):
        ask = partial(QueryEngine(stores(rows)).influence, query, **OPTIONS)
        ask()
        times = []
        for _ in range(3):
            start = CLOCK()
            ask()
            times.append(CLOCK() - start)
        took = sorted(times)[1]
        show(f"cost: 8 queries x {rows:>9,} x {WIDTH:,}: {took * 1e3:9.1f} ms, {8e-6 * rows / took:5.1f} M pairs/s")


class Watched:
    """How far this process's memory grows meanwhile, looked at every few milliseconds."""

    def __init__(self) -> None:
        self._before = self._most = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @property
    def growth(self) -> int:
        """Bytes."""
        return self._most - self._before

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._most = max(self._most, resident())

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()


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
    faster = {}
    for count in (1, 64):
        some = _some(query, 0, count)
        asked = engine.preconditioned(some)
        ask = partial(engine.influence, some, k=10, engine="faiss", progress=False)
        scan = floor_of_pieces(store, asked)
        ratio = w1.compare(f"B10 {count} queries: float32 scan / index", scan, ask, pairs=5, warmup=1, clock=CLOCK)
        show(ratio)
        faster[count] = ratio.quartiles[1]
        show(f"   {ask().note}")
        exactly = partial(engine.influence, some, k=10, progress=False)
        show(
            w1.compare(
                f"B10 {count} queries: float32 scan / exact engine", scan, exactly, pairs=5, warmup=1, clock=CLOCK
            )
        )
    assert _recall(exact, truth) == 1.0
    assert recall >= 0.98
    assert min(faster.values()) >= 4, f"times as fast as the scan, by queries: {faster}"


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
def test_b11_dask(stores: Stores) -> None:
    """Two workers of one thread against the exact engine on the same two cores."""
    dask = pytest.importorskip("distributed")
    store, query = stores(LARGE), queries(WIDTH, 8)
    with (
        dask.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        dask.Client(cluster) as client,
    ):
        ask = partial(QueryEngine(store).influence, query, **OPTIONS)
        on_dask = partial(QueryEngine(store).influence, query, engine="dask", client=client, **OPTIONS)
        one, other = ask(), on_dask()
        for a, b in ((one.proponents(), other.proponents()), (one.opponents(), other.opponents())):
            assert a.ids.tolist() == b.ids.tolist() and a.scores.equal(b.scores)
        show("B11: ids, order and scores are those of the exact engine")
        ratio = w1.compare(f"B11 8 queries x {LARGE:,}: Dask / exact", on_dask, ask, pairs=3, warmup=0)
        show(ratio)
        assert ratio.quartiles[1] <= 1.15
