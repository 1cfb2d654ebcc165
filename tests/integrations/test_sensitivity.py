"""The sensitivity callbacks of both trainers: the monitor's own figures, and a training that does not notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

pytest.importorskip("lightning")
pytest.importorskip("transformers")

import lightning
from logix_like.integrations.huggingface_sensitivity import SensitivityCallback as ForTrainer
from logix_like.integrations.lightning_sensitivity import SensitivityCallback as ForLightning
from logix_like.integrations.looking import in_order
from transformers import Trainer, TrainingArguments

from logix_like.errors import CaptureError, ConfigError
from logix_like.sensitivity import SensitivityMonitor
from tests.integrations.sentences import bert
from tests.models import VOCABULARY
from tests.training import CLASSES, FEATURES, SAMPLES, data

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning.*", "ignore:.*LeafSpec.*")
OPTIONS: dict[str, Any] = {"posterior": "diagonal", "strength": 1.0}


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(0.2), nn.Linear(4, CLASSES))
        self.dataset = TensorDataset(*data(torch.float32))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=5, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=5)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=0.05)


def _fit(root: Path, *callbacks: lightning.Callback) -> tuple[Classifier, lightning.Trainer]:
    torch.manual_seed(1)
    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module)
    return module, trainer


def test_lightning_logs_the_leave_one_out_loss(tmp_path: Path) -> None:
    callback = ForLightning(submodule="net", **OPTIONS)
    module, trainer = _fit(tmp_path, callback)
    own = SensitivityMonitor(module.net, samples=SAMPLES, **OPTIONS)
    found = own.measure([data(torch.float32)])
    torch.testing.assert_close(callback.monitor.latest.sensitivity, found.sensitivity, rtol=1e-4, atol=1e-6)
    assert [look.epoch for look in callback.monitor.history] == [0, 1]
    assert trainer.callback_metrics["loo_loss"].item() == pytest.approx(found.loo_loss, rel=1e-4)
    assert trainer.callback_metrics["sensitivity_val_loss"].item() == pytest.approx(found.train_loss, rel=1e-4)
    plain, _ = _fit(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))


def test_the_hugging_face_trainer_logs_it_too(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"input_ids": torch.randint(VOCABULARY, (4,), generator=generator), "labels": torch.tensor(n % 3)}
        for n in range(7)
    ]
    callback = ForTrainer(parameters=["classifier.*"], **OPTIONS)
    settings = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=3, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    model = bert()
    trainer = Trainer(model=model, args=settings, train_dataset=samples, callbacks=[callback])
    trainer.train()
    logged = [entry["loo_loss"] for entry in trainer.state.log_history if "loo_loss" in entry]
    assert logged == [look.loo_loss for look in callback.monitor.history] and len(logged) == 2
    own = SensitivityMonitor(model, samples=7, parameters=["classifier.*"], **OPTIONS)
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    assert own.measure([batch]).loo_loss == pytest.approx(logged[-1], rel=1e-4)
    assert callback.monitor.latest.data_id.tolist() == list(range(7))


def test_what_cannot_be_watched_is_said(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"it begins with trainer.fit\(\)"):
        _ = ForLightning().monitor
    with pytest.raises(CaptureError, match=r"it begins with trainer.train\(\)"):
        _ = ForTrainer().monitor
    with pytest.raises(ConfigError, match="unknown posterior 'exact'"):
        _fit(tmp_path, ForLightning(submodule="net", posterior="exact"))

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(CaptureError, match="a dataset with an index"):
        in_order(DataLoader(Stream()))
