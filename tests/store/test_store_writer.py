"""The background writer: back-pressure, failures, threads, and what a kill leaves."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import StoreDamagedError, StoreError, StoreWriteError
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import create_store, open_store
from logix_like.store.parts import PartWriter
from tests.store.store_runs import CHUNK_ROWS, WIDTH, batches, log, new_store, small_layout, writer


class Gate:
    """Stands in for a slow or full disk: holds up chunk writes, or lets them fail from the n-th on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fail_at: int | None = None) -> None:
        self.open = threading.Event()
        self.writes = 0
        original = PartWriter.write

        def write(part: PartWriter, *arguments: object) -> dict[str, int]:
            if fail_at is None:
                assert self.open.wait(20)
            self.writes += 1
            if fail_at is not None and self.writes >= fail_at:
                raise OSError(28, "No space left on device")
            return original(part, *arguments)

        monkeypatch.setattr(PartWriter, "write", write)


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


def test_put_waits_while_the_queue_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gate = new_store(tmp_path / "s"), Gate(monkeypatch)
    rows = torch.randn(300, WIDTH)
    room = 3 * 10 * WIDTH * 4 / 2**20
    with writer(store, queue_mib=room) as out:

        def produce() -> None:
            for batch in batches(rows, size=10):
                out.put(batch)

        producer = threading.Thread(target=produce)
        producer.start()
        producer.join(0.3)
        assert producer.is_alive()
        # Four batches are with the worker (a chunk of 16 rows is written, another one waits), three fit the queue.
        assert out.rows <= 80
        gate.open.set()
        producer.join(20)
        assert not producer.is_alive()
    assert open_store(store).gradients[:].equal(rows)


def test_a_batch_larger_than_the_queue_is_taken(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    rows = torch.randn(200, WIDTH)
    with writer(store, queue_mib=0.0001) as out:
        for batch in batches(rows, size=50):
            out.put(batch)
    assert open_store(store).gradients[:].equal(rows)


def test_a_failure_reaches_the_training_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path / "s")
    rows = torch.randn(400, WIDTH)
    with monkeypatch.context() as patch:
        Gate(patch, fail_at=3)
        out = writer(store)
        with pytest.raises(StoreWriteError, match=r"32 of .* rows are committed and safe.*resume=True") as caught:
            for batch in batches(rows):
                out.put(batch)
            out.commit()
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(StoreWriteError):
            out.put(next(batches(rows)))
        out.close()  # told already: no second error hides what the caller is doing about it
        out.close()
    assert open_store(store).gradients[:].equal(rows[:32])
    log(store, rows[32:])
    assert open_store(store).gradients[:].equal(rows)


def test_a_failure_that_nobody_saw_is_raised_by_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path / "s")
    Gate(monkeypatch, fail_at=1)
    out = writer(store)
    out.put(next(batches(torch.randn(5, WIDTH))))
    with pytest.raises(StoreWriteError, match="No space left"):
        out.close()
    out.close()
    assert len(open_store(store)) == 0


def test_a_putter_that_waits_hears_of_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path / "s")
    Gate(monkeypatch, fail_at=1)
    with pytest.raises(StoreWriteError), writer(store, queue_mib=0.0001) as out:
        while True:
            out.put(next(batches(torch.randn(5, WIDTH))))


def test_training_may_go_on_without_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = new_store(tmp_path / "s")
    Gate(monkeypatch, fail_at=2)
    with caplog.at_level(logging.ERROR), writer(store, on_error="stop_logging") as out:
        out.put(next(batches(torch.randn(40, WIDTH), size=40)))
        assert out.commit() == CHUNK_ROWS
        for batch in batches(torch.randn(20, WIDTH)):
            out.put(batch)
        assert (out.rows, out.dropped) == (40, 20)
    assert [r.message.count("logging has stopped, training goes on") for r in caplog.records] == [1]


def test_no_file_is_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path / "s")
    with writer(store) as out:
        out.put(next(batches(torch.randn(20, WIDTH), size=20)))
        out.commit()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", _no_space)
            out.put(next(batches(torch.randn(20, WIDTH), size=20)))
            with pytest.raises(StoreWriteError):
                out.commit()
    assert not list(store.rglob("*.partial"))
    assert len(open_store(store)) == 20


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (ProjectedBatch((1,), torch.ones(2, WIDTH)), r"rows of shape \(2, 21\) for 1 ids"),
        (ProjectedBatch((1,), torch.ones(1, 3)), r"expected \(1, 21\)"),
        (ProjectedBatch((1.5,), torch.ones(1, WIDTH)), "id is 1.5 of type float, expected str or int"),
        (ProjectedBatch(("\ud800",), torch.ones(1, WIDTH)), "cannot be written as UTF-8"),
        (ProjectedBatch((1,), torch.ones(1, WIDTH), loss=torch.ones(2)), "'loss' has 2 values for 1 samples"),
        (ProjectedBatch((1,), torch.ones(1, WIDTH), metadata={"a": ()}), "'a' has 0 values for 1 samples"),
        (ProjectedBatch((1,), torch.ones(1, WIDTH), metadata={"a": ([],)}), "expected str, int or float"),  # type: ignore[dict-item]
        *(
            (ProjectedBatch((1,), torch.ones(1, WIDTH), metadata={name: (1,)}), f"cannot be called {name!r}: its name")
            for name in ("", ".", "..", "a/b", "x" * 300)
        ),
        (ProjectedBatch((1,), torch.ones(1, WIDTH), metadata={7: (1,)}), "column is called 7 of type int"),  # type: ignore[dict-item]
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


def test_torch_keeps_its_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen: dict[str, int] = {}
    torch.set_num_threads(3)
    try:
        statistics = StatisticsAccumulator(small_layout(), ["covariance"])
        original = statistics.update

        def update(rows: torch.Tensor, covered: int | None = None) -> None:
            seen["worker"] = torch.get_num_threads()
            original(rows, covered)

        statistics.update = update  # type: ignore[method-assign]
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


SCRIPT = """
import sys, torch
from pathlib import Path
from tests.store.store_runs import WIDTH, batches, writer
store, mode = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
rows = torch.arange(2000.0).unsqueeze(1).expand(2000, WIDTH).contiguous()
out = writer(store, queue_mib=0.01)
for number, batch in enumerate(batches(rows, size=7)):
    out.put(batch)
    if mode == "kill" and number % 3 == 0:
        print(out.commit(), flush=True)
    if mode == "exit" and number == 20:
        sys.exit(3)
"""


def start(store: Path, mode: str) -> subprocess.Popen[str]:
    """Run the script above in a process of its own."""
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(store), mode],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_acknowledged_rows_survive_a_kill(tmp_path: Path) -> None:
    store, expected = new_store(tmp_path / "s"), 0
    for attempt, lines in enumerate((1, 4, 9), start=1):
        with start(store, "kill") as process:
            assert process.stdout is not None
            acknowledged = [int(process.stdout.readline()) for _ in range(lines)]
            time.sleep(0.004 * attempt)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        opened = open_store(store)
        info = opened.writers[-1]
        assert info.name == f"0-{attempt}" and info.state == "open"
        assert info.rows >= acknowledged[-1] > 0
        rows = opened.gradients[expected:]
        assert rows.equal(torch.arange(float(info.rows)).unsqueeze(1).expand_as(rows)), "torn, lost or doubled"
        assert opened.data_id[expected:].tolist() == list(range(info.rows))
        expected += info.rows
    assert len(open_store(store)) == expected


def test_rows_are_flushed_when_the_interpreter_exits(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with start(store, "exit") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 3 and errors == ""
    opened = open_store(store)
    assert len(opened) == 21 * 7 and opened.writers[0].state == "closed"


def test_rows_are_flushed_when_the_writer_is_forgotten(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    out = writer(store)
    out.put(next(batches(torch.randn(5, WIDTH))))
    del out
    assert len(open_store(store)) == 5


def test_a_forked_child_leaves_the_writer_alone(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    out = writer(store)
    out.put(next(batches(torch.randn(5, WIDTH))))
    out.commit()
    out._process += 1  # as a child sees it: the process number is another one
    out.close()
    out._process -= 1
    assert open_store(store).writers[0].state == "open"
    out.close()
    assert open_store(store).writers[0].state == "closed"


def test_a_missing_record_file_beside_rows_is_damage(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(20, WIDTH))
    (store / "writers/0-1/commits").unlink()
    with pytest.raises(StoreDamagedError, match="commits is missing, but the part has rows"):
        open_store(store)


@pytest.mark.parametrize("described", [True, False])
def test_a_writer_whose_store_was_replaced_writes_nothing_more(tmp_path: Path, described: bool) -> None:
    old = writer(new_store(tmp_path / "s"))
    old.put(next(batches(torch.zeros(5, WIDTH))))
    old.commit()
    create_store(tmp_path / "s", {}, overwrite=True)
    if described:
        (tmp_path / "s/zarr.json").unlink()
        (tmp_path / "s/writers/zarr.json").unlink()
        (tmp_path / "s/writers").rmdir()
        log(new_store(tmp_path / "s"), torch.ones(5, WIDTH))
    before = sorted((tmp_path / "s").rglob("*"))
    for batch in batches(torch.zeros(CHUNK_ROWS + 5, WIDTH)):
        old.put(batch)
    with pytest.raises(StoreWriteError, match=r"was removed or replaced \(overwrite=True\)"):
        old.commit()
    with pytest.raises(StoreWriteError, match="removed or replaced"):
        old.require_present()
    old.close()
    assert sorted((tmp_path / "s").rglob("*")) == before
    rows = open_store(tmp_path / "s")
    assert len(rows) == 5 * described and bool((rows.gradients[:] == 1).all())


def test_a_writer_whose_store_was_removed_does_not_make_it_again(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    old = writer(store)
    store.rename(tmp_path / "aside")
    with pytest.raises(StoreWriteError, match="removed or replaced"):
        old.close()
    assert not store.exists()


def test_a_second_writer_of_a_rank_in_one_process_is_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with writer(store), writer(store, rank=1), pytest.raises(StoreError, match="this process already writes"):
        writer(store)
    log(store, torch.ones(1, WIDTH))
    assert [w.name for w in open_store(store).writers] == ["0-1", "1-1", "0-2"]


def test_another_working_folder_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    statistics = StatisticsAccumulator(small_layout(), ["mean"])
    out = writer(Path(new_store(Path("s")).name), statistics=statistics)
    reader = open_store("s")
    for batch in batches(torch.randn(40, WIDTH)):
        out.put(batch)
        out.commit()
        monkeypatch.chdir(tmp_path / "elsewhere")
    out.close()
    assert len(reader.refresh()) == 40 and reader.statistics.rows == 40
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_forked_child_is_told_that_it_cannot_write(tmp_path: Path) -> None:
    out = writer(new_store(tmp_path / "s"))
    batch = next(batches(torch.randn(5, WIDTH)))
    out._process += 1  # as a child sees it: the process number is another one
    for call in (lambda: out.put(batch), out.commit):
        with pytest.raises(StoreWriteError, match="forked from it without the thread that writes"):
            call()
    out._process -= 1
    out.close()
    assert len(open_store(out.folder.parent.parent)) == 0
