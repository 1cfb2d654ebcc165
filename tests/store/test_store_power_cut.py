"""With ``durability: commit`` what was acknowledged survives a power cut, of which only what was forced remains."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from logix_like.errors import StoreNotFoundError
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import (
    create_store,
    describe,
    merge_parts,
    open_store,
    save_checkpoint,
    supersede_samples,
    verify,
)
from logix_like.store.places import local
from tests.store.power_cut import PowerCut
from tests.store.store_runs import WIDTH, batches, projections, small_layout, writer

ROWS = torch.randn(45, WIDTH, generator=torch.Generator().manual_seed(6))


class Watched:
    """A store on such a disk, and what was acknowledged of it."""

    def __init__(self, folder: Path, disk: PowerCut) -> None:
        self.store = folder / "disk" / "s"
        self.checked = 0
        self.acknowledged = 0
        self.made = False
        self._aside = (folder / f"after-{number}" for number in itertools.count())
        self._disk = disk

    def check(self) -> Path:
        """Cut the power: the store opens with all that was acknowledged, and is sound; returns where it lies."""
        self.checked += 1
        store = self._disk.restored(next(self._aside)) / "s"
        try:
            opened = open_store(store)
        except StoreNotFoundError:
            assert not self.made
            return store
        assert self.acknowledged <= len(opened) <= len(ROWS)
        if len(opened):
            assert opened.gradients[:].equal(ROWS[: len(opened)])
        report = verify(store)
        assert report.ok, str(report)
        return store

    def log(self) -> None:
        statistics = StatisticsAccumulator(small_layout(), ["mean"])
        with writer(self.store, durability="commit", statistics=statistics) as out:
            for batch in batches(ROWS, size=9):
                out.put(batch)
                if batch.step in (1, 3):
                    self.acknowledged = out.commit()
        self.acknowledged = len(ROWS)


@pytest.mark.parametrize("share", [6, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_a_power_cut_takes_nothing_that_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    (tmp_path / "disk").mkdir()
    disk, turns = PowerCut(tmp_path / "disk"), itertools.count()
    watched = Watched(tmp_path, disk)

    def now_and_then() -> None:
        if next(turns) % share == 0:
            shutil.rmtree(watched.check().parent)

    monkeypatch.setattr(local, "os", disk)
    disk.on_sync = now_and_then
    create_store(watched.store, {})
    watched.made = True
    describe(watched.store, small_layout(), "float32", projections(), durability="commit")
    watched.log()
    after = open_store(watched.check())
    assert after.statistics.rows == 45 and after.projections.keys() == projections().keys()
    save_checkpoint(watched.store, {"w": torch.ones(2)}, step=1)
    assert open_store(watched.check()).load_checkpoint(1)["w"].tolist() == [1.0, 1.0]
    supersede_samples(watched.store, [3])
    assert open_store(watched.check()).valid.sum() == 44
    disk.on_sync = bool
    merge_parts(watched.store)
    merged = open_store(disk.restored(tmp_path / "merged") / "s")
    assert merged.gradients[:].equal(ROWS[torch.arange(45) != 3]) and len(merged.writers) == 1
    assert watched.checked > 10
