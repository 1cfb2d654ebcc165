"""What logging takes of a training's time: measured, kept in the store, told."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import logix_like as logix
from logix_like.capture.batch import ProjectedBatch
from logix_like.report.summary import StoreSummary
from logix_like.store import merge_parts, open_store
from logix_like.store.format.commits import format_record, read_commits
from logix_like.store.format.schema import COMMITS
from logix_like.store.places.files import checksum
from logix_like.timing import NOTHING, Stopwatch, Timing

PAUSE = 0.02
"""Seconds of each sleep; far above what a block of these tiny models takes."""


class Pause(nn.Module):
    """Takes a while."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSE)
        return inputs


def log(run: logix.Run, model: nn.Module, blocks: int) -> None:
    for number in range(blocks):
        with run(data_id=[2 * number, 2 * number + 1]):
            model(torch.ones(2, 3)).square().sum().backward()


def test_seconds_of_two_threads_count_once() -> None:
    watch = Stopwatch()
    watch.lap()
    watch.lap()
    begun = threading.Barrier(2)

    def hook() -> None:
        for _ in range(200):
            with watch:
                pass
        begun.wait()
        with watch:
            time.sleep(PAUSE)

    threads = [threading.Thread(target=hook) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = watch.lap()
    assert PAUSE <= took.logging <= took.seconds


def test_nested_seconds_count_once() -> None:
    watch = Stopwatch()
    watch.lap()
    watch.lap()
    with watch, watch:
        watch.timed(time.sleep)(PAUSE)
    time.sleep(PAUSE)
    found = watch.lap()
    assert PAUSE <= found.logging < 2 * PAUSE <= found.seconds
    assert found == watch.total
    assert found.overhead == found.logging / (found.seconds - found.logging)


def test_what_is_done_once_is_left_out() -> None:
    watch = Stopwatch()
    assert watch.lap() == NOTHING
    with watch:
        time.sleep(PAUSE)
    assert watch.lap() == watch.total == NOTHING
    assert NOTHING.overhead is None


def test_a_lap_never_logs_longer_than_it_lasts() -> None:
    watch = Stopwatch()
    watch.lap()
    with watch:  # a block that begins within what is measured, as all do
        watch.lap()
        time.sleep(PAUSE)
        watch.lap()
    found = watch.lap()
    assert found.logging <= found.seconds


def test_the_models_own_time_is_the_trainings(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), Pause())
    with logix.init("slow", model, root=tmp_path, verbose=False) as run:
        log(run, model, 6)
        told = run.timing
    assert told.seconds >= 4 * PAUSE  # of the first block nothing counts, the last has not been followed by another
    assert 0 < told.logging < told.seconds - 4 * PAUSE + 1e-3
    assert run.store.timing == told


def test_waiting_for_the_store_is_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from logix_like.run.session import StoreSession

    put = StoreSession.put

    def slow(session: StoreSession, batch: ProjectedBatch) -> None:
        time.sleep(PAUSE)
        put(session, batch)

    monkeypatch.setattr(StoreSession, "put", slow)
    model = nn.Linear(3, 2)
    with logix.init("wait", model, root=tmp_path, verbose=False) as run:
        log(run, model, 5)
    assert run.timing.logging >= 3 * PAUSE


def test_restarts_add_up_and_a_merged_store_tells_the_same(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    told = []
    for start in range(2):
        with logix.init("twice", model, root=tmp_path, verbose=False, resume=start > 0) as run:
            log(run, model, 4)
        told.append(run.timing)
    total = told[0] + told[1]
    assert run.store.timing == total
    merge_parts(run.path)
    merged = open_store(run.path)
    assert len(merged.writers) == 1 and merged.timing == total
    summary = StoreSummary.of(merged)
    assert summary.to_json()["timing"] == {
        "seconds": total.seconds,
        "logging": total.logging,
        "overhead": total.overhead,
    }
    assert "logging prolonged" in str(summary)


def test_a_store_of_before_has_no_timing(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with logix.init("old", model, root=tmp_path, verbose=False) as run:
        log(run, model, 4)
    (folder,) = (writer.folder for writer in run.store.writers)
    file = tmp_path / "old" / "writers" / folder.name / COMMITS
    lines = []
    for line in file.read_bytes().splitlines():
        entry = json.loads(line[9:])
        entry.pop("timing", None)
        content = json.dumps(entry, separators=(",", ":")).encode()
        lines.append(b"%08x %s\n" % (checksum(content), content))
    file.write_bytes(b"".join(lines))
    old = open_store(run.path)
    assert len(old) == 8 and old.timing.overhead is None
    assert "prolonged" not in str(StoreSummary.of(old))


@pytest.mark.parametrize("timing", [{"seconds": -1.0}, {"seconds": 1.0, "logging": 2.0}, {"seconds": "x"}, 3, "1e999"])
def test_a_garbled_timing_is_damage(tmp_path: Path, timing: object) -> None:
    from logix_like.errors import StoreDamagedError
    from logix_like.store.format.commits import CloseRecord, RowsRecord

    line = format_record(RowsRecord(0, "", 0, 0, 3, {"gradients": 5}, 1, 2, timing=Timing(1.5, 0.25)))
    (tmp_path / COMMITS).write_bytes(line + b"\n")
    assert read_commits(tmp_path).rows[0].timing == Timing(1.5, 0.25)
    content = json.dumps({**json.loads(line[9:]), "timing": timing}).encode()
    bad = b"%08x %s\n" % (checksum(content), content)
    (tmp_path / COMMITS).write_bytes(bad + format_record(CloseRecord(1)) + b"\n")
    with pytest.raises(StoreDamagedError, match="the record is damaged"):
        read_commits(tmp_path)
