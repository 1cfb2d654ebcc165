"""The background writer and its process: kills, exits, forks, locks, and stores that go away."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import StoreError, StoreWriteError
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import StoreWriter, create_store, open_store
from logix_like.store.writing.rowwriter import RowWriter
from logix_like.store.writing.staging import StagedChunk
from tests.store.store_runs import CHUNK_ROWS, WIDTH, batches, log, new_store, small_layout, writer
from tests.store.writer_process import start


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


@pytest.mark.parametrize("where", ["logix_like-writer", "logix_like-files"])
def test_a_writer_may_be_forgotten_in_a_thread_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Python collects a run, which refers to itself, in whichever thread comes to it."""
    store, rows = new_store(tmp_path / "s"), torch.randn(2 * CHUNK_ROWS + 5, WIDTH)
    forgotten, threads = threading.Event(), set(threading.enumerate())
    out = writer(store)

    class Cycle:
        def __init__(self, writer: StoreWriter) -> None:
            self.writer, self.itself = writer, self

    cycle = Cycle(out)
    dead, acts = weakref.ref(out), {"logix_like-writer": StagedChunk.encoded, "logix_like-files": RowWriter.write}
    kind, name = (StagedChunk, "encoded") if where == "logix_like-writer" else (RowWriter, "write")

    def collects(*given: Any, **more: Any) -> Any:
        assert threading.current_thread().name == where and forgotten.wait(20)
        gc.collect()
        return acts[where](*given, **more)

    monkeypatch.setattr(kind, name, collects)
    gc.disable()  # here
    try:
        out.put(ProjectedBatch(tuple(range(len(rows))), rows))
        del out, cycle, Cycle
        forgotten.set()
        until = time.monotonic() + 20
        while set(threading.enumerate()) - threads and time.monotonic() < until:  # also those that are not started yet
            time.sleep(0.01)
    finally:
        gc.enable()
    assert dead() is None
    opened = open_store(store)
    assert opened.gradients[:].equal(rows) and opened.writers[0].state == "closed"


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
