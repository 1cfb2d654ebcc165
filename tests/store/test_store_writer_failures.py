"""The background writer on a slow or full disk: back-pressure, and who hears of a failure."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from logix_like.errors import StoreWriteError
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import Coverage, StoreWriter, open_store
from logix_like.store.format.commits import CommitLog
from logix_like.store.format.parts import PartWriter
from logix_like.store.places.storage import Pending
from logix_like.store.writing.inbox import Request
from tests import interrupts
from tests.interrupts import broken_off_at
from tests.store.store_runs import CHUNK_ROWS, WIDTH, batches, log, new_store, small_layout, writer


class Gate:
    """Stands in for a slow or full disk: holds up chunk writes, or lets them fail from the n-th on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fail_at: int | None = None) -> None:
        self.open = threading.Event()
        self.writes = 0
        original = PartWriter.prepare

        def prepare(part: PartWriter, *arguments: Any) -> tuple[Mapping[str, int], Pending]:
            if fail_at is None:
                assert self.open.wait(20)
            self.writes += 1
            if fail_at is not None and self.writes >= fail_at:
                raise OSError(28, "No space left on device")
            return original(part, *arguments)

        monkeypatch.setattr(PartWriter, "prepare", prepare)


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


def test_a_file_that_cannot_be_closed_after_a_failure_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path / "s")
    Gate(monkeypatch, fail_at=1)
    monkeypatch.setattr(CommitLog, "close", _no_space)
    out = writer(store)
    out.put(next(batches(torch.randn(5, WIDTH))))
    heard: list[Exception] = []

    def ask() -> None:
        try:
            out.commit()
        except StoreWriteError as error:
            heard.append(error)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(20)
    assert "No space left" in str(heard)
    out.close()


def test_a_failure_of_a_forgotten_writer_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As at the end of a script without finalize()."""
    Gate(monkeypatch, fail_at=2)
    out = writer(new_store(tmp_path / "s"))
    out.put(next(batches(torch.randn(20, WIDTH), size=20)))
    with caplog.at_level(logging.ERROR):
        del out
    (record,) = caplog.records
    assert f"{CHUNK_ROWS} rows are committed and safe" in record.message and "No space left" in record.message


def test_closing_that_is_broken_off_anywhere_can_be_ended(tmp_path: Path) -> None:
    """Ctrl-C while a run ends, and then a further run in the same place."""
    store = new_store(tmp_path / "s")
    for step in itertools.count(1):
        out = writer(store)
        out.put(next(batches(torch.randn(5, WIDTH))))
        ended = broken_off_at(step, out.close)
        out.close()
        with pytest.raises(StoreWriteError, match="is closed"):
            out.commit()
        assert open_store(store).writers[-1].state == "closed"
        if ended:
            break
    assert step > 10, "nothing was broken off"  # the interpreter's places for it differ from version to version
    assert len(open_store(store)) == 5 * len(open_store(store).writers)


def test_a_put_that_waits_while_the_writer_is_closed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a handler of SIGTERM, which ends the run while the training thread waits for the disk."""
    store, gate, heard = new_store(tmp_path / "s"), Gate(monkeypatch), list[str]()
    out = writer(store, queue_mib=CHUNK_ROWS * WIDTH * 4 / 2**20)

    def produce() -> None:
        try:
            for batch in batches(torch.randn(300, WIDTH), size=CHUNK_ROWS):
                out.put(batch)
        except StoreWriteError as error:
            heard.append(str(error))

    producer = threading.Thread(target=produce, daemon=True)
    producer.start()
    producer.join(0.3)
    assert producer.is_alive()
    threading.Timer(0.2, gate.open.set).start()
    out.close()
    producer.join(20)
    assert not producer.is_alive() and "is closed" in heard[0]
    assert len(open_store(store)) == out.committed == out.rows


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file broken off as it is opened
def test_a_writer_that_is_broken_off_as_it_begins_leaves_no_lock_and_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at every third place, but for those within Thread.start, which does not stand it itself."""
    monkeypatch.setattr(interrupts, "PLACES", ("logix_like",))
    for step in itertools.count(1, 3):
        store, made = new_store(tmp_path / str(step)), list[StoreWriter]()
        ended = broken_off_at(step, partial(_begin, store, made))
        for one in made:
            one.close()
        writer(store).close()
        if ended:
            break
    assert step > 100, "nothing was broken off"


def _begin(store: Path, made: list[StoreWriter]) -> None:
    made.append(writer(store))


def test_statistics_that_are_given_stay_those_that_were_given(tmp_path: Path) -> None:
    """Also where nobody has committed before: the gathered ones do not take their place when the writer is closed."""
    store, layout = new_store(tmp_path / "s"), small_layout()
    given = StatisticsAccumulator(layout, ["covariance"])
    given.update(torch.full((9, WIDTH), 3.0))
    with writer(store, statistics=StatisticsAccumulator(layout, ["mean"])) as out:
        out.put(next(batches(torch.randn(9, WIDTH), size=9)))
        out.write_statistics(given.snapshot(), Coverage({"0-1": 9}, 0))
    found = open_store(store).statistics
    assert found.covariance("encoder.q").equal(torch.full((12, 12), 9.0, dtype=torch.float64))


@pytest.mark.parametrize("taken", [True, False])
def test_a_batch_that_is_put_as_the_writer_is_closed_is_taken_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """By another thread, behind its look whether the writer is open: never lost without a word."""
    store = new_store(tmp_path / "s")
    out, rows = writer(store), torch.randn(5, WIDTH)
    closing, seal = threading.Thread(target=out.close), out._pipeline.close
    last_is_taken, go = threading.Event(), threading.Event()

    def close() -> None:
        last_is_taken.set()
        go.wait(20)
        seal()

    class Queue:
        """Has the writer closed right before a batch is put, or right behind that."""

        def __init__(self, queue: Any) -> None:
            self._queue = queue

        def put(self, item: Any) -> None:
            if not isinstance(item, Request):
                if taken:
                    self._queue.put(item)
                closing.start()
                last_is_taken.wait(20)
                threading.Timer(0.1, go.set).start()
            if isinstance(item, Request) or not taken:
                self._queue.put(item)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._queue, name)

    monkeypatch.setattr(out._pipeline, "close", close)
    monkeypatch.setattr(out._inbox, "_items", Queue(out._inbox._items))
    if taken:
        out.put(next(batches(rows)))
    else:
        with pytest.raises(StoreWriteError, match="is closed; no row was taken"):
            out.put(next(batches(rows)))
    closing.join(20)
    assert len(open_store(store)) == out.rows == 5 * taken
