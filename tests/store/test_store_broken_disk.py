"""R5: a disk that is full, broken or forbidden at each call of the writer in turn: the store opens every time."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from logix_like.errors import LogixError, StoreError, StoreNotFoundError, StoreWriteError
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import build_view, create_store, describe, open_store, save_checkpoint, verify
from logix_like.store.places import local
from tests.store.broken_disk import BrokenDisk
from tests.store.store_runs import WIDTH, batches, log, projections, small_layout, writer

ROWS = torch.randn(45, WIDTH, generator=torch.Generator().manual_seed(5))


class Training:
    """A whole run on a store, and what was acknowledged of it."""

    def __init__(self, path: Path, on_error: str = "raise", durability: str = "commit") -> None:
        self.path = path
        self.acknowledged = 0
        self.options = {"on_error": on_error, "durability": durability}

    def begin(self) -> None:
        create_store(self.path, {})
        describe(self.path, small_layout(), "float32", projections(), durability=self.options["durability"])

    def log(self) -> None:
        statistics = StatisticsAccumulator(small_layout(), ["mean"])
        with writer(self.path, statistics=statistics, **self.options) as out:
            for batch in batches(ROWS, [n % 30 for n in range(45)], size=9):
                out.put(batch)
                if batch.step in (1, 3):
                    self.acknowledged = max(self.acknowledged, out.commit())

    def end(self) -> None:
        save_checkpoint(self.path, {"w": torch.ones(2)}, step=1)
        build_view(self.path)


def run(training: Training, disk: BrokenDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(local, "os", disk)
        training.begin()
        training.log()
        training.end()


def check(training: Training, where: str) -> None:
    """The store opens with all that was acknowledged, is sound, and is gone on with."""
    try:
        opened = open_store(training.path)
    except StoreNotFoundError:
        assert training.acknowledged == 0, where
        return
    assert training.acknowledged <= len(opened) <= 45, where
    assert opened.gradients[:].equal(ROWS[: len(opened)]) if len(opened) else True, where
    report = verify(training.path)
    assert report.ok, f"{where}: {report}"
    create_store(training.path, {}, resume=True)
    describe(training.path, small_layout(), "float32", projections())
    log(training.path, ROWS[:3])
    assert len(open_store(training.path)) == len(opened) + 3, where
    assert len(open_store(training.path).view("mean")) <= len(opened) + 3


def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    disk = BrokenDisk()
    run(Training(tmp_path / "counted"), disk, monkeypatch)
    return disk.calls


SHARES = [16, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=["full", "broken", "forbidden"])
def test_no_failure_of_the_disk_makes_a_store_that_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, share: int
) -> None:
    calls = counted(tmp_path, monkeypatch)
    for call in range(1 + code % share, calls + 1, share):
        disk, training = BrokenDisk(call, code), Training(tmp_path / f"{call}")
        where = f"call {call} of {calls}"
        if call < calls - 40:
            with pytest.raises(StoreError, match=f"{os.strerror(code)}|bytes of a record were written"):
                run(training, disk, monkeypatch)
        else:
            with contextlib.suppress(LogixError):
                run(training, disk, monkeypatch)
        assert disk.failed, where
        check(training, f"{where}, {disk.failed}")


def test_a_view_that_cannot_be_written_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what was begun cannot be taken away again."""
    for call in range(1, 1000):
        training = Training(tmp_path / f"{call}", durability="process")
        training.begin()
        training.log()
        disk = BrokenDisk(call, errno.EACCES)
        with monkeypatch.context() as patch, contextlib.suppress(StoreWriteError):
            patch.setattr(local, "os", disk)
            build_view(training.path)
        if not disk.failed:
            break
        check(training, f"call {call}, {disk.failed}")


@pytest.mark.parametrize("share", SHARES)
def test_training_goes_on_without_its_log_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, share: int
) -> None:
    for call in range(1 + share // 2, 1000, share):
        caplog.clear()
        training = Training(tmp_path / f"{call}", on_error="stop_logging")
        training.begin()
        out = writer(training.path, **training.options)
        disk = BrokenDisk(call)
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(local, "os", disk)
            for batch in batches(ROWS, size=9):
                out.put(batch)
                training.acknowledged = out.commit()
            out.close()
        if not disk.failed:
            break
        assert [record.message.count("training goes on") for record in caplog.records] == [1], (
            f"call {call}, {disk.failed}"
        )
        check(training, f"call {call}, {disk.failed}")
    else:
        pytest.fail("the disk never held out")


def test_a_full_disk_is_named_where_a_store_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "os", BrokenDisk(2))
    with pytest.raises(StoreWriteError, match=r"No space left.*make room"):
        create_store(tmp_path / "s", {})
