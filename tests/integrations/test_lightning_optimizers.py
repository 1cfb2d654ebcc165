"""A training with several optimizers, whose steps Lightning counts together, is resumed where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch.plugins import MixedPrecision
from logix_like.integrations.lightning import LogixCallback

from logix_like.errors import CaptureError
from tests.integrations.test_lightning import BFLOAT16, IDENTITY, Manual, Saving, logged, relative_error, trainer
from tests.training import SAMPLES

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


def test_a_scaler_that_moves_on_between_two_backward_passes_of_a_batch(tmp_path: Path) -> None:
    module = Manual()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1)
    store = logged(tmp_path, module, max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert scaler.get_scale() == 2.0**10
    assert len(store) == 2 * SAMPLES
    assert relative_error(store, module) <= BFLOAT16


@pytest.mark.parametrize("way", ["one graph", "two graphs"])
def test_two_backward_passes_behind_their_forward_passes_are_said(tmp_path: Path, way: str) -> None:
    class Twice(Manual):
        def training_step(self, batch: list[torch.Tensor], number: int) -> None:
            losses = [self.loss(batch)] * 2 if way == "one graph" else [self.loss(batch), self.loss(batch)]
            for loss in losses:
                self.manual_backward(loss, retain_graph=True)

    with pytest.raises(CaptureError, match="called again without a forward pass since the last call"):
        logged(tmp_path, Twice())
