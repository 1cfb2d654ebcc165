"""Ranges of rows on executors and on Dask give the exact engine's answer, also when a worker dies."""

from __future__ import annotations

import os
import shutil
import signal
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import MissingDependencyError, QueryError
from logix_like.query import distributed, scoring
from logix_like.query.distributed import Asked, Found, RangeTask, scan_range
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.modes import MODES
from logix_like.query.question import REDUCTIONS
from logix_like.query.result import InfluenceResult
from logix_like.store import GradientStore, StoreWriter, create_store, describe, open_store
from logix_like.store.places.files import as_place
from logix_like.store.reading import gradients
from tests.query.memory_store import MemoryStore
from tests.query.test_query_on_disk import LAYOUT, _write


@pytest.fixture(autouse=True)
def short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "RANGE_BYTES", 2 * LAYOUT.width * 70)
    monkeypatch.setattr(scoring, "SIEVED_ROWS", 64)


@pytest.fixture
def store(tmp_path: Path) -> GradientStore:
    rows = torch.randn(300, LAYOUT.width)
    rows[17] = float("nan")
    return _write(tmp_path / "store", rows, [f"s{i % 250}" for i in range(300)], "bfloat16")


@pytest.fixture
def query() -> QueryGradients:
    return QueryGradients(("q0", "q1"), torch.randn(2, LAYOUT.width), LAYOUT)


def _assert_same(store: GradientStore, query: QueryGradients, client: object, **options: Any) -> str:
    engine = QueryEngine(store, keep_bytes=0)
    exact = engine.influence(query, **options)
    found = engine.influence(query, engine="dask", client=client, **options)
    assert found.engine == "dask" and "dask engine" in found.note
    _equal(exact, found)
    return found.note


def _equal(one: InfluenceResult, other: InfluenceResult) -> None:
    for a, b in ((one.proponents(), other.proponents()), (one.opponents(), other.opponents())):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.scores.equal(b.scores)  # bit by bit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_threads_give_the_exact_answer(store: GradientStore, query: QueryGradients, mode: str, reduce: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        _assert_same(store, query, pool, k=7, mode=mode, reduce=reduce)


def test_rows_of_several_ranges_are_told_apart_as_those_of_one(tmp_path: Path) -> None:
    rows = torch.zeros(300, LAYOUT.width)
    rows[:, 0], rows[:, 1] = 1, 1e-10 * torch.arange(300)  # in float32 all scores are 1
    store = _write(tmp_path / "close", rows, [f"s{i}" for i in range(300)], "float32")
    query = QueryGradients(("q",), torch.ones(1, LAYOUT.width), LAYOUT)
    with ThreadPoolExecutor(2) as pool:
        for k in (5, 300):
            _assert_same(store, query, pool, k=k, preconditioner="identity")


def test_some_samples_and_parts(store: GradientStore, query: QueryGradients) -> None:
    chosen = [f"s{i}" for i in range(0, 250, 3)]
    with ThreadPoolExecutor(2) as pool:
        _assert_same(store, query, pool, k=5, data_id=chosen, reduce="none")
        engine = QueryEngine(store, keep_bytes=0)
        options: dict[str, Any] = {"k": 3, "per": "module"}
        found = engine.influence(query, engine="dask", client=pool, **options)
        assert found.top.parts.equal(engine.influence(query, **options).top.parts)


@pytest.mark.slow
def test_processes_give_the_exact_answer(store: GradientStore, query: QueryGradients) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        _assert_same(store, query, pool, k=5)


def _die(part: RangeTask, asked: Asked) -> Found:
    os.kill(os.getpid(), signal.SIGKILL)
    return scan_range(part, asked)


class _Deadly(Executor):
    """Sends the second range to a process that dies of it."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._sent = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._sent += 1
        return self._pool.submit(_die if self._sent == 2 else fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


@pytest.mark.slow
def test_a_broken_pool_changes_nothing_in_the_answer(store: GradientStore, query: QueryGradients) -> None:
    with _Deadly() as pool:
        _assert_same(store, query, pool, k=5)


class _Breaks(Executor):
    """Takes two ranges, and then none."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self.sent = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.sent += 1
        if self.sent > 2:
            raise BrokenExecutor("a process in the pool was terminated abruptly")
        return self._pool.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


def test_a_pool_that_takes_no_further_ranges_changes_nothing(store: GradientStore, query: QueryGradients) -> None:
    with _Breaks() as pool:
        note = _assert_same(store, query, pool, k=5)
        assert f"(workers were lost: {pool.sent - 2} ranges scanned here)" in note


def test_a_pool_that_was_shut_down_is_named(store: GradientStore, query: QueryGradients) -> None:
    with ThreadPoolExecutor(1) as pool:
        pass
    with pytest.raises(QueryError, match=r"client is a ThreadPoolExecutor that takes no more work \(.*\): ask inside"):
        QueryEngine(store).influence(query, k=3, engine="dask", client=pool)


def test_a_copy_of_a_store_is_read_where_it_lies(
    store: GradientStore, query: QueryGradients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "KEPT_BYTES", 0)
    with ThreadPoolExecutor(1) as pool:
        _assert_same(store, query, pool, k=5, reduce="none")
        shutil.copytree(store.path, tmp_path / "copy")
        shutil.rmtree(store.path)
        _assert_same(open_store(tmp_path / "copy"), query, pool, k=5, reduce="none")


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_what_a_worker_decompresses_does_not_stay_in_its_memory(
    query: QueryGradients, tmp_path: Path, codec: str
) -> None:
    create_store(tmp_path, {})
    describe(tmp_path, LAYOUT, "bfloat16", {block.name: (None, None) for block in LAYOUT})
    with StoreWriter(tmp_path, LAYOUT, "bfloat16", codec=codec) as writer:
        writer.put(ProjectedBatch(tuple(range(50)), torch.randn(50, LAYOUT.width)))
    distributed._mapped.cache_clear()
    with ThreadPoolExecutor(1) as pool:
        _assert_same(open_store(tmp_path), query, pool, k=5)
    assert bool(distributed._mapped.cache_info().currsize) == (codec == "none")


def test_a_progress_bar_on_request(
    store: GradientStore, query: QueryGradients, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        for progress in (None, False, True):
            assert capsys.readouterr().err == ""
            QueryEngine(store).influence(query, k=3, engine="dask", client=pool, progress=progress)
    assert "influence" in capsys.readouterr().err


@pytest.mark.slow
def test_dask_survives_a_killed_worker(store: GradientStore, query: QueryGradients) -> None:
    dask = pytest.importorskip("distributed")
    with (
        dask.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        dask.Client(cluster) as client,
    ):
        _assert_same(store, query, client, k=5)
        worker = next(iter(client.run(os.getpid).values()))
        os.kill(worker, signal.SIGKILL)
        _assert_same(store, query, None, k=6)  # the client in use is found


def _die_once(part: RangeTask, asked: Asked, mark: Path) -> Found:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return scan_range(part, asked)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process goes on")


class _KillsAWorker:
    """A Dask client whose third range ends the worker that takes it, once."""

    def __init__(self, client: Any, mark: Path) -> None:
        self._client = client
        self._mark = mark
        self._ranges = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def submit(self, function: Any, *args: Any, **options: Any) -> Any:
        self._ranges += function is scan_range
        if function is scan_range and self._ranges == 3:
            return self._client.submit(_die_once, *args, self._mark, **options)
        return self._client.submit(function, *args, **options)


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_changes_nothing(
    store: GradientStore, query: QueryGradients, tmp_path: Path
) -> None:
    dask = pytest.importorskip("distributed")
    with (
        dask.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        dask.Client(cluster) as client,
    ):
        _assert_same(store, query, _KillsAWorker(client, tmp_path / "killed"), k=5)
        assert (tmp_path / "killed").exists()


def test_what_is_no_client(store: GradientStore, query: QueryGradients, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = QueryEngine(store)
    with pytest.raises(QueryError, match=r"client is a str; it must be a dask.distributed.Client or an executor"):
        engine.influence(query, k=3, engine="dask", client="tcp://here")
    with pytest.raises(QueryError, match="engine='dask' finds the first k only"):
        engine.influence(query, engine="dask")
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'logix_like\[dask\]'"):
        engine.influence(query, k=3, engine="dask")


def test_rows_of_this_process_alone_are_refused(query: QueryGradients) -> None:
    engine = QueryEngine(MemoryStore(LAYOUT, torch.randn(50, LAYOUT.width)))
    with ThreadPoolExecutor(1) as pool, pytest.raises(QueryError, match="MemoryRows lies in this process alone"):
        engine.influence(query, k=3, engine="dask", client=pool)


@pytest.mark.slow
def test_rows_in_an_object_store(query: QueryGradients, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moto")
    dask = pytest.importorskip("distributed")
    from tests.store.s3_server import BUCKET, s3_server

    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        remote = _write(as_place(f"s3://{BUCKET}/store"), torch.randn(300, LAYOUT.width), list(range(300)), "bfloat16")
        with (
            dask.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
            dask.Client(cluster) as client,
        ):
            _assert_same(remote, query, client, k=5)
