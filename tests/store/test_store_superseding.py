"""Rows that are taken back: on disk still, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from logix_like.errors import StoreDamagedError, StoreError
from logix_like.query.completion import ensure_statistics
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import (
    Flag,
    build_view,
    open_store,
    save_checkpoint,
    supersede_samples,
    supersede_steps,
    verify,
)
from logix_like.store.format.schema import RETRACTIONS
from tests.store.store_runs import WIDTH, batches, log, new_store, small_layout, writer

EXACT = 1e-12


def taken_back(store: Path) -> list[bool]:
    return [bool(flag & Flag.SUPERSEDED) for flag in open_store(store).flags]


def test_rows_of_a_step_and_later_ones_count_no_more(tmp_path: Path) -> None:
    store, rows = new_store(tmp_path / "s"), torch.randn(28, WIDTH)
    log(store, rows)  # steps 0 to 3, of 7 rows each
    assert supersede_steps(store, 2) == 14
    log(store, rows[:7], step=2)
    read = open_store(store)
    assert taken_back(store) == [False] * 14 + [True] * 14 + [False] * 7
    assert len(read) == 35 and torch.equal(read.gradients[:28], rows)
    view = read.view("mean")
    assert sorted(view.data_id) == list(range(14))
    expected = torch.cat([rows[:7], rows[7:14]])
    expected[:7] = (rows[:7] + rows[:7]) / 2
    assert torch.equal(view.gradients[:][np.argsort(view.data_id)], expected)
    assert view.left_out == 14
    assert len(read.view("last")) == 14
    assert verify(store).ok


def test_rows_logged_later_are_free_of_it(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with writer(store, commit_seconds=1e9) as out:
        for number, batch in enumerate(batches(torch.randn(14, WIDTH), size=7)):
            out.put(batch)
            if number == 0:
                out.commit()
                supersede_samples(store, [3])
    log(store, torch.randn(7, WIDTH))
    assert [i for i, back in enumerate(taken_back(store)) if back] == [3]


def test_taking_back_twice_takes_nothing_more(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(14, WIDTH))
    assert [supersede_steps(store, 1), supersede_steps(store, 1)] == [7, 0]
    assert len(list((store / RETRACTIONS).iterdir())) == 1
    with pytest.raises(StoreError, match=r"1 of the samples .* is 9 \(a int"):
        supersede_samples(store, [0, 9])
    assert supersede_samples(store, [0]) == 1
    assert taken_back(store) == [True] + [False] * 6 + [True] * 7


def test_an_int_and_its_text_are_two_samples(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(4, WIDTH), ids=[1, "1", 1, "2"])
    assert supersede_samples(store, ["1"]) == 1
    assert taken_back(store) == [False, True, False, False]
    with pytest.raises(StoreError, match=r"is '1' \(a str"):
        supersede_samples(store, ["1"])


def test_views_with_what_is_forgotten_are_removed(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(3, WIDTH), ids=["a", "b", "a"])
    view = build_view(store)
    assert view is not None and view.is_dir()
    supersede_samples(store, ["a"])
    assert not view.exists()
    assert list(open_store(store).view("mean").data_id) == ["b"]


def test_an_open_reader_sees_it_after_a_refresh(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(14, WIDTH))
    read = open_store(store)
    key = read.key
    supersede_steps(store, 1)
    assert read.valid.all() and read.key == key
    assert read.refresh().valid.sum() == 7 and read.key != key


def test_statistics_are_those_of_the_rows_that_count(tmp_path: Path) -> None:
    """Also where the number of rows is by chance that of the sums: 14 gathered, 7 taken back, 7 not gathered."""
    store, rows, names = new_store(tmp_path / "s", "float64"), torch.randn(28, WIDTH).double(), ["mean", "covariance"]
    with writer(store, "float64", statistics=StatisticsAccumulator(small_layout(), names)) as out:
        for batch in batches(rows[:14]):
            out.put(batch)
    supersede_steps(store, 1)
    read = open_store(store)
    assert (read.statistics.rows, read.statistics.superseded) == (14, 7)
    log(store, rows[14:21], "float64", step=1)
    found = ensure_statistics(open_store(store), names)
    kept = torch.cat([rows[:7], rows[14:21]])
    for block in small_layout():
        part = kept[:, block.columns]
        torch.testing.assert_close(found.covariance(block.name), part.T @ part / 14, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(found.mean(block.name), part.mean(0), rtol=EXACT, atol=EXACT)


def test_checkpoints_behind_the_step_are_gone_too(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(21, WIDTH))
    for step in (1, 2, 3):
        save_checkpoint(store, {"w": torch.full((1,), float(step))}, step=step)
    supersede_steps(store, 2)
    save_checkpoint(store, {"w": torch.zeros(1)}, step=3)
    assert [(c.number, c.step) for c in open_store(store).checkpoints] == [(1, 1), (2, 2), (4, 3)]


@pytest.mark.parametrize("spoil", ["flip", "rename", "both", "cut"])
def test_a_damaged_retraction_is_named(tmp_path: Path, spoil: str) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(14, WIDTH))
    supersede_steps(store, 1)
    (file,) = (store / RETRACTIONS).iterdir()
    content = file.read_bytes()
    if spoil == "flip":
        file.write_bytes(content.replace(b'"step": 1', b'"step": 3'))
    elif spoil == "rename":
        file = file.rename(file.with_name("0" * 32 + ".json"))
    elif spoil == "both":
        file.write_bytes(json.dumps({"attributes": {}}).encode())
    else:
        file.write_bytes(content[:-5])
    with pytest.raises(StoreDamagedError, match=str(file)):
        open_store(store)
    assert [damage.file for damage in verify(store).damages] == [file]


def test_forgetting_no_sample_does_nothing(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(5, WIDTH))
    assert supersede_samples(store, []) == 0 and open_store(store).retractions == ()
