"""After a repair a store opens, answers and verifies clean; what was damaged is kept and told of."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from logix_like.errors import StoreDamagedError, StoreError
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.store import as_place, open_store, repair, save_checkpoint, supersede_samples, verify
from logix_like.store.places.files import files_of, read_bytes, write_file
from tests.store.s3_server import BUCKET
from tests.store.store_runs import WIDTH, batches, log, new_store, small_layout, writer
from tests.store.test_store_verify import everything, flip, full_store


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_sound_store_is_left_alone(tmp_path: Path) -> None:
    store = full_store(tmp_path / "s")
    before = contents(store)
    report = repair(store)
    assert report.ok and report.quarantine is None and "nothing was done" in str(report)
    assert contents(store) == before


def test_a_damaged_chunk_takes_its_commit_with_it_and_no_other(tmp_path: Path) -> None:
    store, rows = new_store(tmp_path / "s"), torch.randn(40, WIDTH)
    log(store, rows)
    file = store / "writers/0-1/gradients/c.1.0"
    flip(file, 77)
    bad = file.read_bytes()
    report = repair(store)
    assert report.ok and report.rows == 16 and "16 rows taken out" in str(report) and "rows 16 to 31" in str(report)
    opened = open_store(store)
    assert opened.gradients[:].equal(torch.cat([rows[:16], rows[32:]]))
    assert opened.data_id.tolist() == [*range(16), *range(32, 40)]
    query = QueryGradients(("q",), rows[16:17], small_layout())
    assert QueryEngine(opened).influence(query, k=3, preconditioner="identity").samples == 24
    assert report.quarantine == store / "quarantine/1"
    assert (report.quarantine / "writers/0-1/gradients/c.1.0").read_bytes() == bad
    told = json.loads((report.quarantine / "repair.json").read_text())
    assert told["found"][0]["rows"] == [16, 32] and told["found"][0]["data_id"] == list(range(16, 32))
    assert verify(store).ok and repair(store).quarantine is None
    log(store, rows[16:32])
    assert len(open_store(store)) == 40


def test_a_bad_line_of_the_record_takes_its_commit_and_no_other(tmp_path: Path) -> None:
    store, rows = new_store(tmp_path / "s"), torch.randn(40, WIDTH)
    log(store, rows)
    file = store / "writers/0-1/commits"
    flip(file, 8 * 30)
    with pytest.raises(StoreDamagedError, match="line 1"):
        open_store(store)
    report = repair(store)
    assert report.ok and open_store(store).gradients[:].equal(rows[16:])
    assert open_store(store).writers[0].state == "closed"
    assert (store / "quarantine/1/writers/0-1/commits").exists()


def test_rows_that_were_taken_back_stay_so(tmp_path: Path) -> None:
    store, rows = new_store(tmp_path / "s"), torch.randn(64, WIDTH)
    with writer(store) as out:
        out.put(next(batches(rows[:48], size=48)))
        out.commit()
        supersede_samples(store, [0, 20])
        out.put(next(batches(rows[48:], [f"again-{n}" for n in range(16)], size=16)))
    flip(store / "writers/0-1/gradients/c.0.0", 9)
    assert repair(store).ok
    opened = open_store(store)
    assert opened.data_id[opened.valid].tolist() == [
        *(n for n in range(16, 48) if n != 20),
        *(f"again-{n}" for n in range(16)),
    ]


def test_rows_without_a_record_go_to_quarantine(tmp_path: Path) -> None:
    store, rows = new_store(tmp_path / "s"), torch.randn(40, WIDTH)
    log(store, rows)
    log(store, rows[:5])
    (store / "writers/0-1/commits").unlink()
    report = repair(store)
    assert report.ok and open_store(store).gradients[:].equal(rows[:5])
    assert (store / "quarantine/1/writers/0-1/gradients/c.0.0").exists()


def test_what_nothing_can_replace_is_named_and_left(tmp_path: Path) -> None:
    store = full_store(tmp_path / "s")
    flip(store / "projections/encoder.q/input/c.0.0", 9)
    flip(store / "projections/encoder.k/output/c.0.0", 9)
    report = repair(store)
    assert not report.ok and "input projection of module 'encoder.q'" in str(report.after)
    assert "output projection of module 'encoder.k'" in str(report.after), "each is named"
    assert len(open_store(store)) == 45


def test_a_damaged_manifest_cannot_be_repaired(tmp_path: Path) -> None:
    store = full_store(tmp_path / "s")
    flip(store / "zarr.json", 8 * 200)
    with pytest.raises((StoreDamagedError, StoreError)):
        repair(store)


def test_a_store_that_is_written_to_is_not_repaired(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(20, WIDTH))
    flip(store / "writers/0-1/gradients/c.0.0", 9)
    with writer(store), pytest.raises(StoreError, match="already writes"):
        repair(store)
    assert not (store / "quarantine").exists()


@pytest.mark.parametrize("where", ["memory", "s3"])
@pytest.mark.parametrize("what", ["chunk", "line", "missing line"])
def test_a_store_elsewhere_is_repaired(
    where: str, what: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://repair/{tmp_path.name}"
    if where == "s3":
        for name, value in request.getfixturevalue("s3_environment").items():
            monkeypatch.setenv(name, value)
        url = f"s3://{BUCKET}/{tmp_path.name}"
    store, rows = new_store(as_place(url)), torch.randn(40, WIDTH)
    log(store, rows)
    file = store / "writers/0-1" / ("gradients/c.1.0" if what == "chunk" else "commits/000000001")
    bad = read_bytes(file)
    bad[40] ^= 4
    if what == "missing line":
        files_of(file).move(file, store / "aside")
    else:
        write_file(file, [bad])
    report = repair(url)
    assert report.ok and verify(url).ok, str(report)
    assert open_store(url).gradients[:].equal(torch.cat([rows[:16], rows[32:]]))
    if what != "missing line":
        assert bytes(read_bytes(store / "quarantine/1/writers/0-1" / "/".join(str(file).split("/")[-2:]))) == bytes(bad)
    log(store, rows[16:32])
    assert len(open_store(url)) == 40


def test_the_number_of_a_checkpoint_that_was_taken_out_is_not_given_again(tmp_path: Path) -> None:
    store = full_store(tmp_path / "s")
    number = open_store(store).checkpoints[-1].number
    flip(store / f"checkpoints/{number}.safetensors", 99)
    assert repair(store).ok and number not in [one.number for one in open_store(store).checkpoints]
    assert save_checkpoint(store, {"w": torch.ones(2)}, step=9).number == number + 1


@pytest.mark.parametrize("share", [9, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("kind", ["flip", "missing", "empty"])
def test_after_any_damage_a_repair_makes_the_store_clean(tmp_path: Path, kind: str, share: int) -> None:
    """Every file in turn; only the manifest and the projections' numbers are beyond it."""
    original, chosen = full_store(tmp_path / "original"), random.Random(7)
    files = sorted(contents(original))
    for file in files[len(kind) % share :: share]:
        if file == "zarr.json" or file.endswith(".lock") or ("projections" in file and "/c." in file):
            continue
        store = shutil.copytree(original, tmp_path / "s")
        target = store / file
        if kind == "flip":
            flip(target, chosen.randrange(8 * target.stat().st_size))
        elif kind == "missing":
            target.unlink()
        else:
            target.write_bytes(b"")
        report = repair(store)
        assert report.ok, f"{kind} {file}: {report}"
        lost = file.endswith("commits")  # then nothing tells how many rows there were
        assert lost or len(open_store(store)) == 45 - report.rows, file
        assert len(open_store(store)) >= 5, file
        _ = everything(open_store(store))
        kept = contents(store / "quarantine") if (store / "quarantine").exists() else {}
        gone = set(contents(original)) - set(contents(store)) - ({file} if kind == "missing" else set())
        assert gone <= {name.partition("/")[2] for name in kept}, f"{kind} {file}: something was deleted"
        shutil.rmtree(store)


def test_a_part_that_was_taken_out_never_lends_its_name_again(tmp_path: Path) -> None:
    """Retractions name parts: rows of another one of that name would count as taken back."""
    store = new_store(tmp_path / "s")
    log(store, torch.randn(20, WIDTH))
    supersede_samples(store, [0, 1, 2])
    (store / "writers/0-1/commits").unlink()
    assert repair(store).ok
    log(store, torch.randn(20, WIDTH))
    opened = open_store(store)
    assert opened.writers[-1].name == "0-2" and opened.valid.all() and len(opened) == 20
