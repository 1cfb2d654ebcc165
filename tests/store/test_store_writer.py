"""The background writer: commits, parts, columns of a run, and the files that it leaves."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import StoreDamagedError, StoreError, StoreWriteError
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import open_store
from tests.store.store_runs import WIDTH, batches, log, new_store, small_layout, writer


def test_commit_makes_rows_visible_and_a_tail_is_a_part_of_its_own(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    rows = torch.randn(60, WIDTH)
    reader = open_store(store)
    with writer(store) as out:
        done = 0
        for batch in batches(rows, size=10):
            out.put(batch)
            done += 10
            assert out.commit() == done == out.committed == out.rows
            assert reader.refresh().gradients[:].equal(rows[:done])
        files = {p: p.read_bytes() for p in store.rglob("c.*")}
    assert {p: p.read_bytes() for p in files} == files, "a committed chunk was rewritten"
    (info,) = open_store(store).writers
    assert (info.name, info.rank, info.attempt, info.rows, info.state) == ("0-1", 0, 1, 60, "closed")
    assert len(list((store / "writers/0-1/tails").glob("*/gradients"))) == 6


def test_commits_with_nothing_new_write_nothing(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with writer(store, statistics=StatisticsAccumulator(small_layout(), ["mean"])) as out:
        out.commit()
        out.put(next(batches(torch.randn(5, WIDTH))))
        out.commit()
        size = (out.folder / "commits").stat().st_size
        assert out.commit() == 5
        assert (out.folder / "commits").stat().st_size == size


def test_the_cursor_tells_where_a_run_was(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(40, WIDTH), epoch=3, step=50)
    assert open_store(store).writers[0].cursor == (3, 55)


def test_waiting_rows_are_committed_after_a_while(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    statistics = StatisticsAccumulator(small_layout(), ["mean"])
    with writer(store, commit_seconds=0.05, statistics=statistics) as out:
        out.put(next(batches(torch.randn(5, WIDTH))))
        deadline = time.monotonic() + 20
        while open_store(store).statistics.rows < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert open_store(store).statistics.rows == 5
        assert len(open_store(store)) == 5


def test_a_batch_larger_than_the_queue_is_taken(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    rows = torch.randn(200, WIDTH)
    with writer(store, queue_mib=0.0001) as out:
        for batch in batches(rows, size=50):
            out.put(batch)
    assert open_store(store).gradients[:].equal(rows)


def with_column(name: Any, values: Any) -> ProjectedBatch:
    """One row with a column of the user's."""
    return ProjectedBatch((1,), torch.ones(1, WIDTH), metadata={name: values})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (ProjectedBatch((1,), torch.ones(2, WIDTH)), r"rows of shape \(2, 21\) for 1 ids"),
        (ProjectedBatch((1,), torch.ones(1, 3)), r"expected \(1, 21\)"),
        (ProjectedBatch((1.5,), torch.ones(1, WIDTH)), "id is 1.5 of type float, expected str or int"),
        (ProjectedBatch(("\ud800",), torch.ones(1, WIDTH)), "cannot be written as UTF-8"),
        (ProjectedBatch((1,), torch.ones(1, WIDTH), loss=torch.ones(2)), "'loss' has 2 values for 1 samples"),
        (with_column("a", ()), "'a' has 0 values for 1 samples"),
        (with_column("a", ([],)), "expected str, int or float"),
        *(
            (with_column(name, (1,)), f"cannot be called {name!r}: its name")
            for name in ("", ".", "..", "a/b", "x" * 300)
        ),
        (with_column(7, (1,)), "column is called 7 of type int"),
    ],
)
def test_a_batch_that_cannot_be_stored_is_refused_at_once(tmp_path: Path, batch: ProjectedBatch, message: str) -> None:
    store = new_store(tmp_path / "s")
    with writer(store) as out:
        with pytest.raises(StoreError, match=message):
            out.put(batch)
        out.put(ProjectedBatch((), torch.ones(0, WIDTH)))
        out.put(ProjectedBatch(("good",), torch.ones(1, WIDTH)))
    assert open_store(store).data_id.tolist() == ["good"]


def test_a_closed_writer_takes_no_rows(tmp_path: Path) -> None:
    out = writer(new_store(tmp_path / "s"))
    out.close()
    for call in (lambda: out.put(next(batches(torch.ones(1, WIDTH)))), out.commit):
        with pytest.raises(StoreWriteError, match="is closed"):
            call()


def test_ranks_and_restarts_write_parts_of_their_own(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    for number, ranks in ((0, (1, 0)), (2, (0,))):
        with ExitStack() as stack:
            for out in [stack.enter_context(writer(store, rank=rank)) for rank in ranks]:
                out.put(ProjectedBatch((number,), torch.full((1, WIDTH), float(number))))
                number += 1
    opened = open_store(store)
    assert [w.name for w in opened.writers] == ["0-1", "1-1", "0-2"]
    assert opened.data_id.tolist() == [1, 0, 2]
    assert opened.gradients[:][:, 0].tolist() == [1.0, 0.0, 2.0]


def test_statistics_of_writers_are_added(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    rows = torch.randn(30, WIDTH)
    for rank in (0, 1):
        statistics = StatisticsAccumulator(small_layout(), ["mean", "covariance"])
        with writer(store, rank=rank, statistics=statistics) as out:
            for batch in batches(rows[15 * rank : 15 * rank + 15]):
                out.put(batch)
    opened = open_store(store)
    assert {name: part.rows for name, part in opened.statistics_of_writers.items()} == {"0-1": 15, "1-1": 15}
    assert opened.statistics.rows == 30
    torch.testing.assert_close(opened.statistics.mean("").float(), rows[:, 16:].mean(0))


def test_torch_keeps_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen: dict[str, int] = {}
    torch.set_num_threads(3)
    try:
        statistics = StatisticsAccumulator(small_layout(), ["covariance"])
        original = statistics.update

        def update(rows: torch.Tensor, covered: int | None = None) -> None:
            seen["worker"] = torch.get_num_threads()
            original(rows, covered)

        monkeypatch.setattr(statistics, "update", update)
        with writer(new_store(tmp_path / "s"), statistics=statistics) as out:
            out.put(next(batches(torch.randn(20, WIDTH), size=20)))
            out.commit()
            fresh = threading.Thread(target=lambda: seen.update(fresh=torch.get_num_threads()))
            fresh.start()
            fresh.join()
            seen["training"] = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert seen == {"worker": 1, "fresh": 3, "training": 3}


def test_every_file_is_forced_to_disk_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[str] = []
    original = os.fsync

    def fsync(handle: int) -> None:
        forced.append(os.readlink(f"/proc/self/fd/{handle}"))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    store = new_store(tmp_path / "s")
    forced.clear()
    log(store, torch.randn(20, WIDTH))
    assert forced == []
    with writer(store, durability="commit") as out:
        out.put(next(batches(torch.randn(20, WIDTH), size=20)))
    folder = str(store / "writers/0-2")
    assert f"{folder}/commits" in forced and f"{folder}/gradients" in forced and f"{folder}" in forced
    assert str(store / "writers") in forced
    # Each file under its temporary name, before it is renamed: 3 arrays, twice (chunk and tail).
    assert sum(f"{folder}/" in f and f.endswith(".partial") for f in forced) >= 6
    assert forced.index(f"{folder}/gradients") < forced.index(f"{folder}/commits", forced.index(folder))
    assert len(open_store(store)) == 40


def test_a_missing_record_file_beside_rows_is_damage(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(20, WIDTH))
    (store / "writers/0-1/commits").unlink()
    with pytest.raises(StoreDamagedError, match="commits is missing, but the part has rows"):
        open_store(store)
