"""Every flipped bit is found by ``verify``, and none changes an answer unnoticed."""

from __future__ import annotations

import errno
import logging
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

import logix_like as logix
from logix_like.errors import ConfigError, LogixError, StoreDamagedError, StoreError, StoreNotFoundError
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import GradientStore, build_view, merge_parts, open_store, repair, save_checkpoint, verify
from logix_like.store.format.commits import Commits, read_commits
from logix_like.store.places.local import LOCAL
from tests.store.store_runs import WIDTH, batches, log, new_store, small_layout, writer
from tests.training import data, network, trained_run

SEED = 20


def full_store(path: Path, encoding: str = "bfloat16") -> Path:
    """A store with everything that a store can have: two writers, tails, metadata, view, checkpoints."""
    store = new_store(path, encoding)
    rows = torch.randn(40, WIDTH)
    names: list[str | int] = [f"s{n % 25}" if n % 2 else n % 25 for n in range(40)]
    with writer(store, encoding, statistics=StatisticsAccumulator(small_layout(), ["covariance"])) as out:
        for number, batch in enumerate(batches(rows, names, size=10, metadata={"label": ("a",) * 10})):
            out.put(batch)
            if number == 1:
                out.commit()
    log(store, torch.randn(5, WIDTH), encoding)
    save_checkpoint(store, {"w": torch.ones(3)}, step=1)
    build_view(store)
    return store


def everything(store: GradientStore) -> list[object]:
    """All that a reader can ask for."""
    view = store.view("mean")
    tensors = [store.gradients[:], view.gradients[:], *(t for pair in store.projections.values() for t in pair)]
    sums = {name: {k: v.tolist() for k, v in part.items()} for name, part in store.statistics.sums.items()}
    plain = [store.data_id, store.step, store.epoch, store.loss, store.norm, store.lr, store.flags, view.data_id]
    weights = [{k: v.tolist() for k, v in store.load_checkpoint(c.number).items()} for c in store.checkpoints]
    labels = {name: column.tolist() for name, column in store.metadata.items()}
    shown = [t if t is None else t.tolist() for t in tensors]
    return [repr(shown), sums, [c.tolist() for c in plain], weights, labels, store.manifest, store.checkpoints]


def test_a_sound_store_is_said_to_be_sound(tmp_path: Path) -> None:
    store = full_store(tmp_path / "s")
    told: list[tuple[int, int]] = []
    report = verify(store, lambda done, of: told.append((done, of)))
    assert report.ok and report.rows == 45 and "all as they were committed" in str(report)
    assert told[-1] == (report.files - 1, report.files - 1) and len(told) == report.files - 1


def test_a_damaged_chunk_is_named_with_rows_and_ids(tmp_path: Path) -> None:
    store = full_store(tmp_path / "s")
    file = store / "writers/0-1/gradients/c.0.0"
    flip(file, 8 * 100)
    report = verify(store)
    (damage,) = report.damages
    assert (damage.file, damage.rows) == (file, (0, 16))
    assert damage.data_id is not None and damage.data_id[:3] == (0, "s1", 2) and len(damage.data_id) == 16
    assert not report.ok and "rows 0 to 15" in str(report) and "and 8 more" in str(report)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    store = full_store(tmp_path / "s")
    for name in ("writers/0-1/columns/c.0.0", "writers/0-1/gradients/zarr.json", "checkpoints/1.safetensors"):
        aside = tmp_path / "aside"
        (store / name).rename(aside)
        assert [d.file for d in verify(store).damages] == [store / name]
        aside.rename(store / name)


def test_there_must_be_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        verify(tmp_path)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.mark.parametrize("flips", [60, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_every_flipped_bit_is_found_and_none_gives_another_answer(tmp_path: Path, flips: int) -> None:
    """R3: bits chosen at random, files alike often whatever their size."""
    chosen, original = random.Random(SEED), full_store(tmp_path / "s")
    expected = everything(open_store(original))
    files = sorted(f.relative_to(original) for f in original.rglob("*") if f.is_file() and f.stat().st_size)
    kept = shutil.copytree(original, tmp_path / "kept")
    for number in range(flips):
        file = original / (files[number % len(files)] if flips >= len(files) else chosen.choice(files))
        bit = chosen.randrange(8 * file.stat().st_size)
        flip(file, bit)
        where = f"seed {SEED}, flip {number}: bit {bit} of {file}"
        try:
            assert not verify(original).ok, f"{where} was not found"
        except StoreNotFoundError:
            pass  # the manifest's own file: the folder is no store any more
        except LogixError as error:
            assert str(original) in str(error)
        try:
            found = everything(open_store(original))
        except LogixError:
            found = expected
        spoilt = file.name == "commits"  # a bad last record is dropped as torn: fewer rows, and verify says so
        assert spoilt or found == expected, f"{where} changed an answer"
        shutil.copyfile(kept / file.relative_to(original), file)
    sys.stdout.write(f"\n{flips} single bits flipped in {len(files)} files, seed {SEED}: all found, 0 other answers\n")


def test_a_flipped_bit_in_a_gradient_is_found_at_its_first_reading(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(40, WIDTH))
    opened = open_store(store)
    flip(store / "writers/0-1/gradients/c.1.0", 77)
    assert opened.gradients[:16].shape == (16, WIDTH)
    for _ in range(2):
        with pytest.raises(StoreDamagedError, match=r"c\.1\.0.*rows 16 to 31.*checksum"):
            _ = opened.gradients[:]


@pytest.mark.parametrize("array", ["gradients/c.1.0", "columns/c.1.0", "data_id/c.1"])
def test_damaged_rows_can_be_left_out(tmp_path: Path, array: str, caplog: pytest.LogCaptureFixture) -> None:
    store, rows = new_store(tmp_path / "s"), torch.randn(40, WIDTH)
    log(store, rows)
    flip(store / "writers/0-1" / array, 77)
    with caplog.at_level(logging.WARNING):
        opened = open_store(store, on_damage="skip")
    assert "24 to 31" not in caplog.text and "16 damaged rows are left out" in caplog.text
    assert opened.gradients[:].equal(torch.cat([rows[:16], rows[32:]]))
    assert opened.data_id.tolist() == [*range(16), *range(32, 40)]
    assert opened.damaged_rows == 16 and len(opened.damages) == 1 and "rows 16 to 31" in opened.damages[0]
    assert opened.key != open_store(store).key
    query = QueryGradients(("q",), rows[16:17], small_layout())
    answer = QueryEngine(opened).influence(query, k=3, preconditioner="identity")
    assert "16 stored rows left out (their files are damaged)" in answer.note
    log(store, rows[:4])
    assert len(opened.refresh()) == 28


def test_what_to_do_with_damage_is_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known: raise, skip"):
        open_store(new_store(tmp_path / "s"), on_damage="ignore")


def test_a_loaded_run_fails_on_damage_or_says_what_it_left_out(tmp_path: Path) -> None:
    model = network(torch.float32)
    trained_run(tmp_path, model, epochs=2, store={"chunk_mib": 10 * 86 * 2 / 2**20})
    store = tmp_path / "run"
    file = next((store / "writers/0-1/gradients").glob("c.1.*"))
    flip(file, 99)
    x, y = data(torch.float32)

    def answer(**options: Any) -> logix.InfluenceResult:
        run = logix.load(store, model, **options)
        with run.query(data_id=["q"]) as query:
            F.cross_entropy(model(x[:1]), y[:1]).backward()
        return run.compute_influence_all(query, reduce="none", preconditioner="identity")

    with pytest.raises(StoreDamagedError, match=r"c\.1\..*does not match its checksum"):
        answer()
    left = answer(on_damage="skip")
    assert "10 stored rows left out (their files are damaged)" in left.note and left.samples == 36


def test_a_store_that_is_written_to_meanwhile_is_sound(tmp_path: Path) -> None:
    """A live writer removes statistics that it has replaced; that is no damage."""
    store, rows = new_store(tmp_path / "s"), list(batches(torch.randn(70, WIDTH)))
    with writer(store, statistics=StatisticsAccumulator(small_layout(), ["covariance"])) as out:
        out.put(rows[0])
        out.commit()

        def write_more(done: int, of: int) -> None:
            if done == 1:
                out.put(rows[1])
                out.commit()

        report = verify(store, write_more)
        assert report.ok and report.rows == 7
        assert open_store(store).statistics.rows == 14


def test_a_store_that_is_merged_meanwhile_is_sound(tmp_path: Path) -> None:
    store = full_store(tmp_path / "s")
    merged: list[object] = []

    def merge(done: int, of: int) -> None:
        if not merged:
            merged.append(merge_parts(store))

    report = verify(store, merge)
    assert merged and report.ok and report.rows == 45


def test_each_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    store = full_store(tmp_path / "s")
    for step in (2, 3):
        save_checkpoint(store, {"w": torch.full((3,), float(step))}, step=step)
    flip(store / "checkpoints/1.json", 40)
    flip(store / "checkpoints/3.safetensors", 600)
    found = {damage.file for damage in verify(store).damages}
    assert found == {store / "checkpoints/1.json", store / "checkpoints/3.safetensors"}


def unreachable(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Have one file or folder refused, as where the permission to read it is missing."""

    def refuse(path: Path, act: Callable[[Path], Any]) -> Any:
        if path == place:
            raise PermissionError(errno.EACCES, "Permission denied")
        return act(path)

    for name in ("read", "map", "names"):
        act = getattr(LOCAL, name)
        monkeypatch.setattr(LOCAL, name, lambda path, act=act: refuse(path, act))


REFUSED = [
    "zarr.json",
    "writers",
    "writers/0-1/commits",
    "writers/0-1/gradients/c.0.0",
    "writers/0-1/statistics/2/zarr.json",
    "checkpoints/1.json",
    "checkpoints/1.safetensors",
    "projections/encoder.q/input/c.0.0",
]


@pytest.mark.parametrize("file", REFUSED)
@pytest.mark.parametrize("on_damage", ["raise", "skip"])
def test_what_cannot_be_reached_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, on_damage: Literal["raise", "skip"]
) -> None:
    """A missing permission or a network that is down says nothing of the bytes: nothing is left out for it."""
    store = full_store(tmp_path / "s")
    unreachable(monkeypatch, store / file)
    with pytest.raises(StoreError, match=r"could not be read .*Permission denied.* not known") as caught:
        everything(open_store(store, on_damage=on_damage))
    assert not isinstance(caught.value, StoreDamagedError)


@pytest.mark.parametrize("file", [*REFUSED[3:], "retractions", "views/mean"])
def test_what_cannot_be_reached_is_not_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    store = full_store(tmp_path / "s")
    with monkeypatch.context() as patch:
        unreachable(patch, store / file)
        with pytest.raises(StoreError, match=r"could not be read .*Permission denied.* not known"):
            repair(store)
    assert not (store / "quarantine").exists() and verify(store).ok


def test_chunks_that_a_live_writer_adds_meanwhile_are_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not in the record as it was read before."""
    store, rows = new_store(tmp_path / "s"), torch.randn(88, WIDTH)
    more = list(batches(rows[40:], list(range(40, 88)), size=16))
    with writer(store) as out:
        for batch in batches(rows[:40], size=8):
            out.put(batch)
        out.commit()

        def read_then_write(folder: Path) -> Commits:
            commits = read_commits(folder)
            while more:
                out.put(more.pop(0))
            out.commit()
            return commits

        monkeypatch.setattr("logix_like.store.upkeep.verify.read_commits", read_then_write)
        report = verify(store)
    assert report.ok and report.rows == 40, str(report)
    assert open_store(store).gradients[:].equal(rows)
