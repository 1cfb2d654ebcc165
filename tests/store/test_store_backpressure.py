"""Storage slower than training: memory stays bounded, nothing is lost, and a failure is heard of."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.store import MemoryStore

from logix_like.errors import StoreWriteError
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import create_store, describe, open_store
from logix_like.store.places.objects import ObjectFiles
from logix_like.store.places.storage import Bytes, ObjectPath, Pending
from logix_like.store.writing.behind import Behind
from logix_like.store.writing.pipeline import STAGED_SHARE
from logix_like.store.writing.writer import StoreWriter
from tests.interrupts import broken_off_at
from tests.store.store_runs import WIDTH, batches, chunk_mib, new_store, projections, small_layout, writer

CHUNK_ROWS, BATCH, QUEUED = 32, 8, 5
ROW_BYTES = 4 * WIDTH


class SlowFiles(ObjectFiles):
    """An object store in memory that takes its time for each chunk, and may break down after some."""

    def __init__(self, seconds: float, *, last: int | None = None) -> None:
        super().__init__(MemoryStore())
        self.seconds = seconds
        self.last = last
        self.chunks = 0

    def prepare(
        self, contents: Mapping[ObjectPath, Iterable[Bytes]], *, sync: bool = False, once: bool = False
    ) -> Pending:
        """Sleep over each chunk of rows."""
        if any(path.parent.name == "gradients" and path.name.startswith("c.") for path in contents):
            time.sleep(self.seconds)
            self.chunks += 1
            if self.last is not None and self.chunks > self.last:
                raise OSError(110, "the bucket does not answer")
        return super().prepare(contents, sync=sync, once=once)


def slow_writer(files: SlowFiles, encoding: str, **options: Any) -> StoreWriter:
    place = ObjectPath("slow://bucket", "run", files)
    create_store(place, {"project": "test"})
    describe(place, small_layout(), encoding, projections())
    return StoreWriter(
        place,
        small_layout(),
        encoding,
        chunk_mib=chunk_mib(CHUNK_ROWS, encoding),
        queue_mib=QUEUED * BATCH * ROW_BYTES / 2**20,
        **options,
    )


@pytest.mark.parametrize("encoding", ["bfloat16", "int4"])
@pytest.mark.parametrize("gathers", [False, True])
def test_rows_in_memory_are_bounded_whatever_the_storage(encoding: str, gathers: bool) -> None:
    files, rows = SlowFiles(0.02), torch.randn(640, WIDTH)
    statistics = StatisticsAccumulator(small_layout(), ["covariance"]) if gathers else None
    most = 0
    with slow_writer(files, encoding, statistics=statistics) as out:
        start = time.monotonic()
        for batch in batches(rows, size=BATCH):
            out.put(batch)
            most = max(most, out.rows - out.committed)
        waited = time.monotonic() - start
    # In the queue, in the chunk that is staged, in the one that is written, and the batch between two of them.
    assert most <= QUEUED * BATCH + 2 * CHUNK_ROWS + BATCH
    assert files.chunks == 20 and waited >= 0.02 * 15
    store = open_store(ObjectPath("slow://bucket", "run", files))
    assert store.data_id.tolist() == list(range(640))
    if encoding == "bfloat16":
        assert store.gradients[:].equal(rows.bfloat16().float())


def test_a_chunk_of_few_bits_takes_no_more_memory_than_others() -> None:
    for encoding in ("float32", "bfloat16", "int8", "int4", "sign"):
        files = SlowFiles(0)
        with slow_writer(files, encoding) as out:
            for batch in batches(torch.randn(320, WIDTH), size=BATCH):
                out.put(batch)
        store = open_store(ObjectPath("slow://bucket", "run", files))
        largest = max(len(chunk) for chunk in store.chunks())
        assert largest * ROW_BYTES <= STAGED_SHARE * chunk_mib(CHUNK_ROWS, encoding) * 2**20


def test_storage_that_breaks_down_is_heard_of_and_what_was_acknowledged_is_there() -> None:
    files, rows = SlowFiles(0.005, last=4), torch.randn(640, WIDTH)
    said = r"the bucket does not answer.*128 of .* rows are committed"
    with pytest.raises(StoreWriteError, match=said), slow_writer(files, "float32") as out:
        for batch in batches(rows, size=BATCH):
            out.put(batch)
    assert out.committed == 128
    store = open_store(ObjectPath("slow://bucket", "run", files))
    assert store.gradients[:].equal(rows[:128])


def test_tasks_are_done_in_order_one_at_a_time_while_their_owner_goes_on() -> None:
    behind, done, gate = Behind("test"), list[int](), threading.Event()

    def first() -> None:
        gate.wait(10)
        done.append(0)

    behind.run(first)
    assert done == []
    threading.Timer(0.05, gate.set).start()
    for number in range(1, 50):
        behind.run(partial(done.append, number))
        assert len(done) >= number
    behind.wait()
    assert done == list(range(50))
    behind.close()
    behind.close()


def test_a_failed_task_is_told_at_each_call_and_nothing_follows_it() -> None:
    behind, done = Behind("test"), list[int]()

    def fail() -> None:
        raise OSError("no space")

    behind.run(fail)
    for call in (behind.wait, lambda: behind.run(lambda: done.append(1)), behind.wait):
        with pytest.raises(OSError, match="no space"):
            call()
    behind.close()
    assert done == []


def test_closing_waits_for_the_task_under_way() -> None:
    behind, done = Behind("test"), list[int]()

    def slow() -> None:
        time.sleep(0.05)
        done.append(1)

    behind.run(slow)
    behind.close()
    assert done == [1]


def test_a_put_that_is_broken_off_anywhere_locks_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the training thread, at each step of the interpreter within ``put``."""
    store = new_store(tmp_path / "s")
    given = list(batches(torch.randn(8 * 4000, WIDTH), size=8))
    with writer(store, queue_mib=2 * 8 * ROW_BYTES / 2**20) as out:
        for step in itertools.count(1):
            if broken_off_at(step, partial(out.put, given[step])):
                break
        asked = threading.Thread(target=out.commit, daemon=True)
        asked.start()
        asked.join(timeout=20)
        assert not asked.is_alive(), "the writer's thread or this one waits for ever"
    assert step > 50, "nothing was broken off"
    numbers = open_store(store).data_id.tolist()
    assert numbers[-8:] == list(given[step].data_id)
    assert len(set(numbers)) == len(numbers) and len(numbers) % 8 == 0
