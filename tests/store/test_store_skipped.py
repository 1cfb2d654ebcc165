"""With ``on_damage="skip"`` whatever is damaged is left out and named, and the rest answers."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

import logix_like as logix
from logix_like.errors import StoreDamagedError
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.store import GradientStore, build_view, merge_parts, open_store, repair
from tests.store.store_runs import WIDTH, log, new_store, small_layout
from tests.store.test_store_verify import flip, full_store
from tests.training import network, trained_run

QUERY = QueryGradients(("q",), torch.ones(1, WIDTH), small_layout())


def answer(store: GradientStore, **options: Any) -> logix.InfluenceResult:
    return QueryEngine(store).influence(QUERY, k=3, preconditioner="covariance", **options)


def test_damaged_statistics_are_computed_anew(tmp_path: Path) -> None:
    store = full_store(tmp_path / "s", "float32")
    expected = answer(open_store(store)).proponents(3).scores
    flip(store / "writers/0-1/statistics/2/outer_sum/c.0", 8 * 30)
    with pytest.raises(StoreDamagedError, match=r"outer_sum.*checksum"):
        answer(open_store(store))
    opened = open_store(store, on_damage="skip")
    assert len(opened) == 45 and opened.damaged_rows == 0
    assert len(opened.damages) == 1 and "computed anew" in opened.damages[0] and "outer_sum" in opened.damages[0]
    torch.testing.assert_close(torch.as_tensor(answer(opened).proponents(3).scores), torch.as_tensor(expected))


def test_a_damaged_line_of_a_record_takes_its_rows_and_no_others(tmp_path: Path) -> None:
    store, rows = new_store(tmp_path / "s"), torch.randn(40, WIDTH)
    log(store, rows)
    log(store, rows[:5], ids=list(range(40, 45)))
    flip(store / "writers/0-1/commits", 8 * 30)
    opened = open_store(store, on_damage="skip")
    assert opened.gradients[:].equal(torch.cat([rows[16:], rows[:5]]))
    assert opened.damaged_rows == 16 and "line 1 is no record" in opened.damages[0]
    assert "16 stored rows left out (their files are damaged)" in answer(opened, reduce="none").note
    log(store, rows[:4])
    assert len(opened.refresh()) == 33


def test_rows_without_a_record_are_left_out(tmp_path: Path) -> None:
    store, rows = new_store(tmp_path / "s"), torch.randn(40, WIDTH)
    log(store, rows)
    log(store, rows[:5])
    (store / "writers/0-1/commits").unlink()
    opened = open_store(store, on_damage="skip")
    assert opened.gradients[:].equal(rows[:5]) and opened.damaged_rows == 40 and "is missing" in opened.damages[0]


def test_a_merged_part_without_the_line_that_names_the_old_ones_doubles_none(tmp_path: Path) -> None:
    """As after a merge that was killed when it took the old parts away; the part's document names them too."""
    store = new_store(tmp_path / "s")
    for start in (0, 20):
        log(store, torch.randn(20, WIDTH), ids=list(range(start, start + 20)))
    kept = copytree(store / "writers", tmp_path / "writers")
    merge_parts(store)
    for name in ("0-1", "0-2"):
        copytree(kept / name, store / "writers" / name)
    (record,) = store.glob("writers/merged-*/commits")
    flip(record, 8 * 12)
    assert sorted(open_store(store, on_damage="skip").data_id) == list(range(40))
    assert repair(store).ok and sorted(open_store(store).data_id) == list(range(40))
    assert repair(store).quarantine is None


@pytest.mark.parametrize("file", ["tails/0/gradients/c.0.0", "tails/0/columns/c.0.0", "commits", "zarr.json"])
@pytest.mark.parametrize("where", ["store", "cache"])
def test_a_damaged_sample_view_is_made_anew(tmp_path: Path, cache_folder: Path, file: str, where: str) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(6, WIDTH), ids=["a", "b", "a", "b", "c", "c"])
    expected = open_store(store).view("mean").gradients[:]
    if where == "store":
        view = build_view(store)
    else:
        (view,) = (cache_folder / "views").glob("*/*")
    assert view is not None
    flip(view / file, 8 * 30)
    for _ in range(2):
        assert open_store(store, on_damage="skip").view("mean").gradients[:].equal(expected)


def test_the_view_of_a_reader_that_was_spoilt_at_its_end_is_made_anew(tmp_path: Path, cache_folder: Path) -> None:
    """Whose last line is then taken for a torn one, so that it seems never to have been finished."""
    store = new_store(tmp_path / "s")
    log(store, torch.randn(6, WIDTH), ids=["a", "b", "a", "b", "c", "c"])
    expected = open_store(store).view("mean").gradients[:]
    (record,) = (cache_folder / "views").glob("*/*/commits")
    flip(record, 8 * (record.stat().st_size - 5))
    assert open_store(store).view("mean").gradients[:].equal(expected)


def test_a_loaded_run_opens_what_is_left_of_a_record(tmp_path: Path) -> None:
    model = network(torch.float32)
    trained_run(tmp_path, model, epochs=2, store={"chunk_mib": 10 * 86 * 2 / 2**20})
    flip(tmp_path / "run/writers/0-1/commits", 8 * 30)
    with pytest.raises(StoreDamagedError, match=r"line 1.*logix-like repair"):
        logix.load(tmp_path / "run", model)
    assert len(logix.load(tmp_path / "run", model, on_damage="skip").store) == 36
