"""Bar B6: what the callbacks add to a training by the Hugging Face Trainer and by Lightning.

Run by ``python -m pytest tests/bench/test_trainers.py -s``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from logix_like.integrations.huggingface import LogixCallback as HuggingFaceCallback
from logix_like.integrations.lightning import LogixCallback as LightningCallback
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from tests.bench import w1

STEPS, PAIRS = 12, 20
pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning.*", "ignore:.*LeafSpec.*")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def sequences() -> list[dict[str, Tensor]]:
    tokens = torch.cat(w1.batches())[: STEPS * w1.BATCH]
    return [{"input_ids": row, "labels": row} for row in tokens]


def settings(folder: Path) -> dict[str, Any]:
    return {"config": w1.CONFIG, "root": str(folder), "overwrite": True, "verbose": False}


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = w1.model()

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        return w1.loss(self.model, batch["input_ids"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def huggingface(folder: Path, logged: bool) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=w1.BATCH, num_train_epochs=1, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=1e-4, dataloader_pin_memory=False,
    )  # fmt: skip
    callbacks = [HuggingFaceCallback("hf", **settings(folder))] if logged else []
    Trainer(w1.model(), arguments, train_dataset=sequences(), callbacks=callbacks).train()


def by_lightning(folder: Path, logged: bool) -> None:
    config = {**settings(folder)}
    config["config"] = {**w1.CONFIG, "modules": {"include": ["model.model.layers.*"], "types": ["Linear"]}}
    callbacks = [LightningCallback("lightning", **config)] if logged else []
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(sequences(), batch_size=w1.BATCH, shuffle=True))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("train", [huggingface, by_lightning])
def test_b6_a_logged_training(tmp_path: Path, train: Callable[[Path, bool], None]) -> None:
    """Whole trainings in turn, with their start and end."""
    start = time.perf_counter()
    ratio = w1.compare(
        f"B6 {train.__name__}: {STEPS} steps logged / plain",
        lambda: train(tmp_path, True),
        lambda: train(tmp_path, False),
        pairs=PAIRS,
        warmup=1,
    )
    sys.stdout.write(f"\n{ratio}  ({time.perf_counter() - start:.0f} s)\n")
    assert ratio.quartiles[1] <= 1.06
