"""A training with several optimizers, whose steps Lightning counts together, is resumed where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lightning")

from logix_like.integrations.lightning import LogixCallback

from tests.integrations.test_lightning import IDENTITY, Manual, Saving, trainer

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning.*", "ignore:.*LeafSpec.*")


def test_rows_behind_an_older_checkpoint_of_several_optimizers_are_taken_back(tmp_path: Path) -> None:
    checkpoint = tmp_path / "older.ckpt"
    first = LogixCallback("run", root=tmp_path, verbose=False, **IDENTITY)
    trainer(tmp_path, first, Saving(10, checkpoint)).fit(Manual())
    before = first.run.store
    again = LogixCallback("run", root=tmp_path, verbose=False, **IDENTITY)
    trainer(tmp_path, again).fit(Manual(), ckpt_path=checkpoint)
    store = again.run.store
    assert list(store.valid[: len(before)]) == list(before.step < 5)
    assert sorted(set(store.step[store.valid])) == sorted(set(before.step))
