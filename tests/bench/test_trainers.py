"""Bar B6: what the callbacks add to a training by the Hugging Face Trainer and by Lightning.

Run by ``python -m pytest tests/bench/test_trainers.py -s``. Two trainings, one logged and one plain, take their steps
in turn in two threads, so that whatever else the machine does hits both. What a logged training does once, at its
start and end, is measured by itself and spread over the 64 steps of workload W1.
"""

from __future__ import annotations

import sys
import threading
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
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.bench import w1

STEPS, WARMUP = 40, 3
pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning.*", "ignore:.*LeafSpec.*")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Turns:
    """Lets two trainings take their steps one after the other, and times each."""

    def __init__(self) -> None:
        self._barriers = [threading.Semaphore(1), threading.Semaphore(0)]
        self.times: tuple[list[float], list[float]] = ([], [])
        self._since = 0.0

    def take(self, who: int) -> None:
        self._barriers[who].acquire()
        self._since = time.perf_counter()

    def give(self, who: int) -> None:
        self.times[who].append(time.perf_counter() - self._since)
        self._barriers[1 - who].release()


class HuggingFaceTurns(TrainerCallback):
    def __init__(self, turns: Turns, who: int) -> None:
        self._turns, self._who = turns, who

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._turns.take(self._who)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._turns.give(self._who)


class LightningBegins(lightning.Callback):
    def __init__(self, turns: Turns, who: int) -> None:
        self._turns, self._who = turns, who

    def on_train_batch_start(self, *args: Any) -> None:
        self._turns.take(self._who)


class LightningEnds(LightningBegins):
    def on_train_batch_start(self, *args: Any) -> None:
        """The step began before the other callbacks."""

    def on_train_batch_end(self, *args: Any) -> None:
        self._turns.give(self._who)


def sequences(steps: int) -> list[dict[str, Tensor]]:
    tokens = torch.cat(w1.batches())[: steps * w1.BATCH]
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


def huggingface(folder: Path, turns: Turns, who: int) -> Callable[[], object]:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=w1.BATCH, num_train_epochs=1, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=1e-4, dataloader_pin_memory=False,
    )  # fmt: skip
    callbacks = [] if who else [HuggingFaceCallback("hf", **settings(folder))]
    callbacks.append(HuggingFaceTurns(turns, who))
    return Trainer(w1.model(), arguments, train_dataset=sequences(STEPS), callbacks=callbacks).train


def by_lightning(folder: Path, turns: Turns, who: int) -> Callable[[], object]:
    config = settings(folder)
    config["config"] = {**w1.CONFIG, "modules": {"include": ["model.model.layers.*"], "types": ["Linear"]}}
    logging = [] if who else [LightningCallback("lightning", **config)]
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
        callbacks=[LightningBegins(turns, who), *logging, LightningEnds(turns, who)],
    )  # fmt: skip
    module = Module()
    loader: DataLoader[Any] = DataLoader(sequences(STEPS), batch_size=w1.BATCH, shuffle=True)
    return lambda: trainer.fit(module, loader)


def in_turn(acts: list[Callable[[], object]]) -> None:
    failures: list[BaseException] = []

    def run(act: Callable[[], object]) -> None:
        torch.set_num_threads(2)
        try:
            act()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(900)
    assert not failures, failures[0]


def once(folder: Path) -> float:
    """Seconds that a logged training takes at its start, in its first block and at its end."""
    from logix_like import init

    model, tokens = w1.model(), w1.batches()[0][:, :8]
    took = []
    for number in range(7):
        times = [time.perf_counter()]
        run = init(f"once{number}", model, {**w1.CONFIG, "root": str(folder)}, verbose=False)
        times.append(time.perf_counter())
        for _ in range(2):
            with run(data_id=range(w1.BATCH)):
                w1.loss(model, tokens).backward()
                times.append(time.perf_counter())
            times.append(time.perf_counter())
        first, second = times[3] - times[2], times[5] - times[4]
        start = time.perf_counter()
        run.finalize()
        took.append(times[1] - times[0] + max(0.0, first - second) + time.perf_counter() - start)
    return sorted(took)[len(took) // 2]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("training", [huggingface, by_lightning])
def test_b6_a_logged_training(tmp_path: Path, training: Callable[[Path, Turns, int], Callable[[], object]]) -> None:
    turns, steps = Turns(), w1.SEQUENCES // w1.BATCH
    in_turn([training(tmp_path, turns, who) for who in range(2)])
    ours, other = (times[WARMUP:] for times in turns.times)
    ratio = w1.ratio_of(f"B6 {training.__name__}: a step logged / plain", ours, other)
    extra = once(tmp_path)
    whole = ratio.quartiles[1] + extra / (steps * ratio.other)
    sys.stdout.write(
        f"\n{ratio}\nonce, at start and end: {extra * 1e3:.0f} ms; a training of {steps} steps logged / plain: "
        f"{whole:.3f}\n"
    )
    assert whole <= 1.06
