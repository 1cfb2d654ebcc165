"""R1: writers killed at random instants, again and again, each going on behind what its last one left."""

from __future__ import annotations

import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import StoreError
from logix_like.store import open_store, verify
from tests.store.store_runs import WIDTH, new_store, writer

SEED = 4
RANKS = 2
LONGEST = 0.03
"""Seconds that a writer lives at most once it has started: several chunks and commits."""
ROWS = 200_000
ACKNOWLEDGED = struct.Struct("<q")


class Child:
    """A forked process that writes rows ``done``, ``done + 1``, ... of a rank until it is killed.

    Forked and not started anew, since importing torch takes longer than a hundred such lives.
    """

    def __init__(self, store: Path, rows: torch.Tensor, rank: int, done: int) -> None:
        self._pipe, target = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            try:
                _write_until_killed(store, rows, rank, done, target)
            finally:
                os._exit(1)
        os.close(target)
        assert os.read(self._pipe, ACKNOWLEDGED.size), "the writer did not start"

    def kill(self) -> int:
        """Kill it; returns the rows that it had acknowledged."""
        os.kill(self._process, signal.SIGKILL)
        _, status = os.waitpid(self._process, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the writer had ended by itself"
        told = b""
        while piece := os.read(self._pipe, 1 << 16):
            told += piece
        os.close(self._pipe)
        counts = [count for (count,) in ACKNOWLEDGED.iter_unpack(told[: len(told) // 8 * 8])]
        return max(counts, default=0)


def _write_until_killed(store: Path, rows: torch.Tensor, rank: int, done: int, target: int) -> None:
    chosen = random.Random(done)
    out = writer(store, rank=rank, queue_mib=0.01)
    os.write(target, ACKNOWLEDGED.pack(done))
    while True:
        size = chosen.randrange(1, 12)
        ids = tuple(f"{rank}-{n}" for n in range(done, done + size))
        out.put(ProjectedBatch(ids, _row(rows, done, size), step=done, epoch=rank))
        done += size
        if chosen.random() < 0.3:
            assert done < ROWS
            out.commit()
            os.write(target, ACKNOWLEDGED.pack(done))


def _row(rows: torch.Tensor, first: int, size: int) -> torch.Tensor:
    """Rows that are all different and none zero: a few random ones, each with its own number in front."""
    numbers = torch.arange(first, first + size)
    taken = rows[numbers % len(rows)]
    taken[:, 0] = numbers + 1.0
    return taken


def _check(store: Path, rows: torch.Tensor, acknowledged: list[int]) -> list[int]:
    """How many rows of each rank there are: its first ones, each once and as it was put."""
    opened, found = open_store(store), []
    for rank in range(RANKS):
        mine = opened.epoch == rank
        count = int(mine.sum())
        assert count >= acknowledged[rank], f"{acknowledged[rank] - count} acknowledged rows of rank {rank} are lost"
        assert opened.data_id[mine].tolist() == [f"{rank}-{n}" for n in range(count)]
        if count:
            assert opened.gradients[mine].equal(_row(rows, 0, count)), f"a row of rank {rank} is not as it was put"
        found.append(count)
    assert len(opened) == sum(found) and opened.valid.all()
    return found


def _show(line: str) -> None:
    sys.stdout.write(f"\n{line}\n")  # seen with pytest -s


def _count(store: Path, acknowledged: list[int]) -> list[int]:
    """How many rows of each rank the records tell of; none that was acknowledged is missing."""
    writers = open_store(store).writers
    found = [sum(one.rows for one in writers if one.rank == rank) for rank in range(RANKS)]
    assert all(count >= known for count, known in zip(found, acknowledged, strict=True)), (found, acknowledged)
    return found


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_no_kill_loses_doubles_or_tears_a_row(tmp_path: Path, kills: int) -> None:
    chosen = random.Random(SEED)
    rows = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(SEED))
    store, done, gained = new_store(tmp_path / "s"), [0] * RANKS, 0
    for number in range(kills):
        children = [Child(store, rows, rank, done[rank]) for rank in range(RANKS)]
        time.sleep(chosen.uniform(0, LONGEST))
        acknowledged = [max(done[rank], child.kill()) for rank, child in enumerate(children)]
        # What is committed never changes, so that reading all of it now and then finds what any kill did to it.
        done = _check(store, rows, acknowledged) if number % 10 == 0 else _count(store, acknowledged)
        gained += sum(acknowledged) > 0
    assert _check(store, rows, done) == done
    _show(f"{kills} kills of {RANKS} writers each, seed {SEED}: opened {kills} times, {sum(done):,} rows, none lost")
    assert verify(store).ok
    assert gained > 0 and len(open_store(store).writers) == kills * RANKS
    for rank in range(RANKS):  # the last start is let live
        with writer(store, rank=rank) as out:
            ids = tuple(f"{rank}-{n}" for n in range(done[rank], done[rank] + 30))
            out.put(ProjectedBatch(ids, _row(rows, done[rank], 30), epoch=rank))
        done[rank] += 30
    assert _check(store, rows, done) == done


def test_a_second_process_of_a_rank_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    store, rows = new_store(tmp_path / "s"), torch.ones(4, WIDTH)
    child = Child(store, rows, 0, 0)
    with pytest.raises(StoreError, match=r"another process writes to .* as rank 0"):
        writer(store)
    with writer(store, rank=1):
        pass
    child.kill()
    for _ in range(2):
        with writer(store) as out:
            out.put(ProjectedBatch(("a",), rows[:1]))
