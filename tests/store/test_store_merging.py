"""Merged parts hold the same rows, bit for bit, in whole chunks; a kill at any instant loses and doubles none."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import StoreDamagedError, StoreError, StoreWriteError
from logix_like.query.completion import ensure_statistics
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import (
    ENCODINGS,
    GradientStore,
    Place,
    StoreWriter,
    as_place,
    merge_parts,
    open_store,
    repair,
    supersede_samples,
    supersede_steps,
    verify,
)
from logix_like.store.format import damage
from logix_like.store.format.commits import RowsRecord
from logix_like.store.places import local
from logix_like.store.places.files import names_in, write_file
from logix_like.store.upkeep import merging
from logix_like.store.writing.rowwriter import RowWriter
from tests.store.broken_disk import BrokenDisk, Killed
from tests.store.s3_server import BUCKET
from tests.store.store_runs import (
    CHUNK_ROWS,
    WIDTH,
    SomePlace,
    batches,
    chunk_mib,
    log,
    new_store,
    small_layout,
    writer,
)
from tests.store.test_store_verify import everything, flip


def scattered(path: SomePlace, encoding: str = "float32") -> SomePlace:
    """Three writers, of which two left tails, one was never closed, and ids of both kinds and metadata."""
    store = new_store(path, encoding)
    for rank, rows in enumerate((37, 5, 50)):
        ids: list[str | int] = [f"{rank}-{n}" if n % 2 else 100 * rank + n for n in range(rows)]
        statistics = StatisticsAccumulator(small_layout(), ["covariance"])
        with writer(store, encoding, rank=rank, statistics=statistics) as out:
            more = {"metadata": {"label": ("a",) * 7}} if rank == 2 else {}
            for batch in batches(torch.randn(rows, WIDTH), ids, epoch=rank):
                fitting = {"metadata": {"label": ("a",) * len(batch.data_id)}} if more else {}
                out.put(ProjectedBatch(batch.data_id, batch.rows, step=batch.step, epoch=rank, **fitting))
                if batch.step == 2:
                    out.commit()
    return store


def rows_of(store: Place) -> list[object]:
    """Every row that stands, with all that it carries."""
    opened = open_store(store)
    standing = opened.flags & 2 == 0
    columns = [getattr(opened, name)[standing].tolist() for name in ("data_id", "step", "epoch", "norm", "flags")]
    return [opened.gradients[standing].tolist(), *columns, opened.metadata["label"][standing].tolist()]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_merged_rows_are_the_same(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_chunk_mib", lambda store: chunk_mib(CHUNK_ROWS, encoding))
    store = scattered(tmp_path / "s", encoding)
    before, statistics = rows_of(store), open_store(store).statistics
    told: list[tuple[int, int]] = []
    report = merge_parts(store, lambda done, of: told.append((done, of)))
    assert rows_of(store) == before and verify(store).ok
    opened = open_store(store)
    assert [one.name for one in opened.writers] == ["merged-2"] and opened.writers[0].state == "closed"
    torch.testing.assert_close(opened.statistics.covariance("encoder.q"), statistics.covariance("encoder.q"))
    assert opened.statistics.rows == 92 and report.rows == 92 and told[-1] == (184, 184)
    if encoding not in ("int8", "int4", "sign"):
        assert [segment.rows for segment in opened.table.segments] == [16] * 5 + [12]
        assert report.chunks[1] == 6 and "chunks" in str(report)
    assert sorted(entry.name for entry in (store / "writers").iterdir() if entry.suffix != ".lock") == [
        "merged-2",
        "zarr.json",
    ]
    again = merge_parts(store)
    assert again.chunks[0] == again.chunks[1] or encoding in ("int8", "int4", "sign")


def test_rows_that_were_taken_back_are_dropped_and_names_never_come_again(tmp_path: Path) -> None:
    store = scattered(tmp_path / "s")
    supersede_samples(store, ["2-1", 0])
    supersede_steps(store, 5)
    before = rows_of(store)
    report = merge_parts(store)
    assert report.dropped > 2 and rows_of(store) == before
    assert (open_store(store).flags & 2 == 0).all()
    cursor = open_store(store).writers[0].cursor
    log(store, torch.ones(4, WIDTH), step=6)
    opened = open_store(store)
    assert [one.name for one in opened.writers] == ["merged-2", "0-3"] and opened.valid[-4:].all()
    assert cursor[1] >= 5 and len(opened) == report.rows + 4


def test_a_damaged_store_is_not_merged(tmp_path: Path) -> None:
    store = scattered(tmp_path / "s")
    flip(store / "writers/1-1/tails/0/gradients/c.0.0", 9)
    with pytest.raises(StoreDamagedError):
        merge_parts(store)
    assert len(open_store(store).writers) == 3 and not list((store / "writers").glob("*.partial"))


def test_a_store_that_is_written_to_is_not_merged(tmp_path: Path) -> None:
    store = scattered(tmp_path / "s")
    with writer(store, rank=2), pytest.raises(StoreError, match="already writes"):
        merge_parts(store)


def test_a_rank_that_begins_as_a_merge_does_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its part would be taken for one that nobody writes to any more."""
    store, begun = scattered(tmp_path / "s"), list[StoreWriter]()

    def open_beside(path: Place) -> GradientStore:
        if not begun:
            begun.append(writer(path, rank=7))
            begun[0].put(next(batches(torch.randn(5, WIDTH), size=5)))
            begun[0].commit()
        return GradientStore(path)

    monkeypatch.setattr("logix_like.store.upkeep.merging.GradientStore", open_beside)
    with pytest.raises(StoreError, match=r"already writes to .* as rank 7"):
        merge_parts(store)
    begun[0].close()
    assert len(open_store(store)) == 97 and merge_parts(store).rows == 97


def test_a_merged_part_whose_last_line_is_damaged_is_not_taken_for_an_unfinished_one(tmp_path: Path) -> None:
    store = scattered(tmp_path / "s")
    merge_parts(store)
    record = store / "writers/merged-2/commits"
    flip(record, 8 * (record.stat().st_size - 5))
    assert len(open_store(store)) == 92 and not verify(store).ok


@pytest.mark.parametrize("where", ["memory", "s3"])
def test_a_store_elsewhere_is_merged_by_one_conditional_put(
    where: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://merge/{tmp_path.name}"
    if where == "s3":
        for name, value in request.getfixturevalue("s3_environment").items():
            monkeypatch.setenv(name, value)
        url = f"s3://{BUCKET}/{tmp_path.name}"
    store = scattered(as_place(url))
    before = rows_of(store)
    with monkeypatch.context() as patch:
        patch.setattr(RowWriter, "seal", _killed)
        with pytest.raises(Killed):
            merge_parts(url)
    assert rows_of(store) == before and verify(url).ok, "a merge that is not finished is seen"
    report = merge_parts(url)
    assert report.rows == 92 and rows_of(store) == before and verify(url).ok
    assert [one.name for one in open_store(url).writers] == ["merged-3"]
    assert sorted(name for name in names_in(store / "writers") if "-" in name) == ["merged-3"]


def _killed(*_: object) -> None:
    raise Killed


def test_a_reader_follows_a_merge(tmp_path: Path) -> None:
    store = scattered(tmp_path / "s")
    reader = open_store(store)
    before = rows_of(store)
    merge_parts(store)
    assert reader.refresh().writers[0].name == "merged-2"
    assert reader.gradients[:].tolist() == before[0]


@pytest.mark.parametrize("share", [12, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_merge_may_be_killed_at_any_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int) -> None:
    """Each call by which it changes the disk is once the last one."""
    original = scattered(tmp_path / "original")
    before, counted = rows_of(original), BrokenDisk()
    shutil.copytree(original, tmp_path / "counted")
    with monkeypatch.context() as patch:
        patch.setattr(local, "os", counted)
        merge_parts(tmp_path / "counted")
    for call in range(1 + random.Random(3).randrange(share), counted.calls + 1, share):
        store = shutil.copytree(original, tmp_path / "s")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(local, "os", BrokenDisk(call, dead=True))
            merge_parts(store)
        assert rows_of(store) == before, f"killed at call {call}"
        assert verify(store).ok, f"killed at call {call}"
        merge_parts(store)
        assert rows_of(store) == before and not list((store / "writers").glob("*.partial"))
        assert len(open_store(store).writers) == 1 and open_store(store).statistics.rows == 92
        shutil.rmtree(store)


def test_an_empty_store_and_one_chunk_are_left_alone(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    assert merge_parts(store).rows == 0
    log(store, torch.randn(2 * CHUNK_ROWS + 3, WIDTH))
    before = everything(open_store(store))
    assert merge_parts(store).parts == (1, 1) and everything(open_store(store)) == before


def test_merged_statistics_are_those_of_the_rows_that_stand(tmp_path: Path) -> None:
    """Also once as many new rows, of which none was gathered, make up for those that were dropped."""
    store, rows = new_store(tmp_path / "s", "float64"), torch.randn(24, WIDTH).double()
    with writer(store, "float64", statistics=StatisticsAccumulator(small_layout(), ["mean", "covariance"])) as out:
        for batch in batches(rows[:21]):
            out.put(batch)
    supersede_samples(store, [0, 1, 2])
    merge_parts(store)
    merged = open_store(store).statistics
    assert (merged.rows, merged.superseded) == (18, 0)
    log(store, rows[21:], "float64")
    found = ensure_statistics(open_store(store), ["covariance"])
    for block in small_layout():
        part, whole = rows[3:21, block.columns], rows[3:, block.columns]
        torch.testing.assert_close(merged.covariance(block.name), part.T @ part / 18)
        torch.testing.assert_close(found.covariance(block.name), whole.T @ whole / 21)


def test_merged_kronecker_factors_still_tell_of_rows_that_were_taken_back(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with writer(store, statistics=StatisticsAccumulator(small_layout(), ["kronecker", "covariance"])) as out:
        for batch in batches(torch.randn(21, WIDTH)):
            out.put(batch)
    supersede_samples(store, [0, 1, 2])
    merge_parts(store)
    assert (open_store(store).statistics.rows, open_store(store).statistics.superseded) == (18, 3)
    supersede_samples(store, [3])
    assert open_store(store).statistics.superseded == 4 and verify(store).ok
    merge_parts(store)
    assert open_store(store).statistics.superseded == 4 and open_store(store).statistics.has("encoder.q", "samples")


def test_a_reader_that_opens_during_a_merge_leaves_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``on_damage="skip"`` all files are read, which takes long: those of merged parts are gone, not damaged."""
    store = scattered(tmp_path / "s")
    read, merged = damage.damaged_files, list[object]()

    def damaged_files(folder: Place, record: RowsRecord, first: int) -> Iterator[StoreDamagedError]:
        if not merged:
            merged.append(merge_parts(store))
        return read(folder, record, first)

    monkeypatch.setattr(damage, "damaged_files", damaged_files)
    opened = open_store(store, on_damage="skip")
    assert merged and len(opened) == 92 and opened.damages == ()


def test_a_reader_from_before_a_merge_is_told_of_it(tmp_path: Path) -> None:
    store = scattered(tmp_path / "s")
    reader = open_store(store)
    merge_parts(store)
    for read in (lambda: reader.gradients[:], lambda: reader.data_id, lambda: reader.statistics):
        with pytest.raises(StoreDamagedError, match=r"merged since it was opened .* refresh"):
            read()
    shutil.rmtree(store / "projections")
    with pytest.raises(StoreDamagedError, match=r"cannot be read .* restore the file from a copy"):
        _ = open_store(store).projections


@pytest.mark.parametrize("when", ["_write", "_require_equal"])
def test_what_is_taken_back_during_a_merge_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """By a run that has ended and so holds no lock; the merged part has these rows still, and is to be reached."""
    store, act = scattered(tmp_path / "s"), getattr(merging, when)

    def forget(*given: object) -> None:
        supersede_samples(store, ["0-1", 100])
        act(*given)

    with monkeypatch.context() as patch:
        patch.setattr(merging, when, forget)
        assert merge_parts(store).rows == 92
    opened = open_store(store)
    assert sorted(opened.data_id[~opened.valid], key=str) == ["0-1", 100] and opened.statistics.superseded == 2
    assert merge_parts(store).rows == 90 and open_store(store).valid.all()


def test_what_is_taken_back_as_a_merge_begins_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, begin = scattered(tmp_path / "s"), merging._row_writer

    def forget_before(opened: GradientStore, folder: Path) -> RowWriter:
        folder.rename(tmp_path / "aside")  # so that no new part is there to be named
        supersede_samples(store, ["0-1"])
        (tmp_path / "aside").rename(folder)
        return begin(opened, folder)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_row_writer", forget_before)
        with pytest.raises(StoreError, match=r"taken back while its merge began; nothing was changed: run it again"):
            merge_parts(store)
    assert len(open_store(store).writers) == 3 and merge_parts(store).dropped == 1


def test_a_retraction_that_a_merge_overtakes_names_the_new_part_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge begins between the listing of the parts and the writing of the retraction."""
    store, merged = scattered(tmp_path / "s"), list[object]()

    def merge_first(*given: Any, **more: Any) -> None:
        if not merged:
            merged.append(merge_parts(store))
        write_file(*given, **more)

    monkeypatch.setattr("logix_like.store.format.retractions.write_file", merge_first)
    supersede_samples(store, ["0-1"])
    opened = open_store(store)
    assert opened.writers[0].name == "merged-2" and opened.data_id[~opened.valid].tolist() == ["0-1"]


@pytest.mark.parametrize("act", [merge_parts, repair, lambda store: supersede_samples(store, ["0-1"])])
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], object]) -> None:
    store = scattered(tmp_path / "s")
    if act is repair:
        flip(store / "writers/0-1/gradients/c.0.0", 9)
    for call in (1, 2, 3):
        with monkeypatch.context() as patch, pytest.raises(StoreWriteError, match=r"No space left.*make room"):
            patch.setattr(local, "os", BrokenDisk(call))
            act(store)
    assert open_store(store, on_damage="skip").table
    act(store)
