"""A run's numbers stand in the trainer's own log, and the training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("transformers")

import lightning
from logix_like.integrations.huggingface import LogixCallback as ForTrainer
from logix_like.integrations.huggingface_sensitivity import SensitivityCallback
from logix_like.integrations.lightning import LogixCallback as ForLightning
from transformers import Trainer, TrainerCallback

from logix_like.errors import ConfigError
from tests.integrations import sentences as s
from tests.integrations.test_sensitivity import Classifier

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning.*", "ignore:.*LeafSpec.*")
ROWS, NORM, OVERHEAD = "logix_like/rows", "logix_like/gradient_norm_p50", "logix_like/overhead"


class Reporter(TrainerCallback):
    """Stands for TensorBoard's and wandb's: it comes before a user's callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def trainer(folder: Path, **changes: Any) -> tuple[Trainer, Reporter]:
    reporter = Reporter()
    settings = {"learning_rate": 0.1, "logging_strategy": "steps", "logging_steps": 3, **changes}
    arguments = s.arguments(folder, **settings)
    return Trainer(s.bert(), arguments, train_dataset=s.labelled(), callbacks=[reporter]), reporter


def parameters(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in module.parameters()]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(parameters(one), parameters(other), strict=True))


def test_the_hugging_face_trainer_logs_them(tmp_path: Path) -> None:
    plain, _ = trainer(tmp_path)
    plain.train()
    told, reporter = trainer(tmp_path)
    told.add_callback(ForTrainer("told", root=tmp_path, verbose=False, log_to=told))
    told.train()
    losses = [(e["step"], e["loss"]) for e in plain.state.log_history if "loss" in e]
    assert losses and losses == [(e["step"], e["loss"]) for e in told.state.log_history if "loss" in e]
    ours = [entry for entry in told.state.log_history if ROWS in entry]
    assert [entry["step"] for entry in ours][: len(losses)] == [step for step, _ in losses]
    assert all(entry[NORM] > 0 for entry in ours) and ours[0][OVERHEAD] > 0
    assert ours[-1][ROWS] == 2 * s.SAMPLES
    assert [e[NORM] for e in reporter.seen if NORM in e] == [e[NORM] for e in ours]
    assert same(plain.model, told.model)


def test_nothing_is_logged_unless_asked_for(tmp_path: Path) -> None:
    told, _ = trainer(tmp_path)
    told.add_callback(ForTrainer("silent", root=tmp_path, verbose=False))
    told.train()
    assert not any(name.startswith("logix_like/") for entry in told.state.log_history for name in entry)


def test_the_leave_one_out_loss_reaches_the_reporters_and_keeps_the_trainers_own_log(tmp_path: Path) -> None:
    told, reporter = trainer(tmp_path, logging_strategy="epoch")
    told.add_callback(SensitivityCallback(posterior="diagonal", strength=1.0, parameters=["classifier.*"], log_to=told))
    told.train()
    assert sum("loo_loss" in entry for entry in reporter.seen) == 2
    assert sum("loss" in entry for entry in told.state.log_history) == 2


class Numbers(lightning.pytorch.loggers.Logger):
    """A logger of Lightning's kind."""

    name, version = "numbers", 0

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""


@pytest.mark.parametrize("to_module", [True, False])
def test_lightning_logs_them(tmp_path: Path, to_module: bool) -> None:
    fitted, logger = [], Numbers()
    for logs in (False, True):
        torch.manual_seed(1)
        module = Classifier()
        callbacks = []
        if logs:
            target = module if to_module else logger
            callbacks = [ForLightning("told", root=tmp_path, verbose=False, log_to=target)]
        lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=logger if logs else False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=2, callbacks=callbacks,
            default_root_dir=tmp_path,
        ).fit(module)  # fmt: skip
        fitted.append(module)
    ours = [metrics for metrics in logger.seen if ROWS in metrics]
    assert ours and all(metrics[NORM] > 0 for metrics in ours) and ours[-1][OVERHEAD] > 0
    assert same(*fitted)


@pytest.mark.parametrize("callback", [ForTrainer, ForLightning])
def test_what_is_no_logger_is_refused_before_training(tmp_path: Path, callback: Any) -> None:
    with pytest.raises(ConfigError, match="log_to is a str"):
        callback("wrong", root=tmp_path, log_to="wandb")
