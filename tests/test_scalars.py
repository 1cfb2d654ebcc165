"""Numbers for the loggers of a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import logix_like as logix
from logix_like.errors import ConfigError
from logix_like.scalars import ScalarLog, sink_of
from logix_like.sensitivity import SensitivityMonitor


def log(run: logix.Run, model: nn.Module, first: int) -> None:
    with run(data_id=range(first, first + 10)):
        model(torch.randn(10, 3)).square().sum().backward()


def test_rows_and_norms_are_told(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with logix.init("told", model, root=tmp_path, verbose=False) as run:
        scalars = ScalarLog(run, "x/")
        assert scalars.read() == {"x/rows": 0.0, "x/rows_per_second": 0.0}
        for start in (0, 10, 20):
            log(run, model, start)
        told = scalars.read()
        assert told["x/rows"] == 30 and told["x/rows_per_second"] > 0
        assert told["x/overhead"] == run.timing.overhead
        norms = run.get_log().gradients.norm(dim=1)
        assert told["x/gradient_norm_p50"] == pytest.approx(float(norms.quantile(0.5)))
        assert told["x/gradient_norm_p05"] <= told["x/gradient_norm_p50"] <= told["x/gradient_norm_p95"]
        before = run.timing
        log(run, model, 30)
        again = scalars.read()
        assert again["x/rows"] == 40 and again["x/rows_per_second"] > 0
        assert again["x/overhead"] == (run.timing - before).overhead


def test_rows_that_are_not_finite_have_no_norm(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with logix.init("nan", model, root=tmp_path, verbose=False) as run:
        with run(data_id=[0, 1]):
            model(torch.full((2, 3), float("nan"))).sum().backward()
        assert set(ScalarLog(run).read()) == {"logix_like/rows", "logix_like/rows_per_second"}


def test_the_leave_one_out_loss_of_a_monitor_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
    monitor = SensitivityMonitor(model, samples=8, posterior="dense", strength=1.0)
    with logix.init("loo", model, root=tmp_path, verbose=False) as run:
        scalars = ScalarLog(run, "", monitor=monitor)
        with run(data_id=range(8)):
            F.cross_entropy(model(x), y).backward()
        assert "loo_loss" not in scalars.read()
        found = monitor.measure([(x, y)])
        told = scalars.read()
    assert (told["loo_loss"], told["train_loss"]) == (found.loo_loss, found.train_loss)


class _Told:
    """What a logger was told."""

    def __init__(self) -> None:
        self.told: dict[str, float] = {}
        self.step = -1


class _Writer(_Told):
    """As TensorBoard's."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told[name], self.step = value, step


class _Module(_Told):
    """As a LightningModule: ``log`` takes a name and a value, ``log_dict`` the whole."""

    def log(self, name: str, value: float) -> None:
        raise AssertionError("one by one")

    def log_dict(self, numbers: dict[str, float]) -> None:
        self.told = numbers


class _Logger(_Told):
    """As Lightning's loggers and MLflow."""

    def log_metrics(self, numbers: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.told, self.step = numbers, step


class _Run(_Told):
    """As wandb's run and the Hugging Face Trainer."""

    def log(self, numbers: dict[str, float]) -> None:
        self.told = numbers


class _Function(_Told):
    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        self.told, self.step = dict(numbers), step


@pytest.mark.parametrize("kind", [_Writer, _Module, _Logger, _Run, _Function])
def test_every_kind_of_logger_is_written_to(tmp_path: Path, kind: type[_Told]) -> None:
    target = kind()
    model = nn.Linear(3, 2)
    with logix.init("kinds", model, root=tmp_path, verbose=False) as run:
        log(run, model, 0)
        ScalarLog(run, log_to=target).write(7)
    assert set(target.told) >= {"logix_like/rows", "logix_like/gradient_norm_p95"}
    assert target.step == (-1 if kind in (_Module, _Run) else 7)


@pytest.mark.parametrize("wrong", [3, "wandb", {}])
def test_what_cannot_be_written_to_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"log_to is a (int|str|dict); it must be a function of"):
        sink_of(wrong)


def test_writing_needs_somewhere_to_write(tmp_path: Path) -> None:
    run = logix.init("nowhere", nn.Linear(3, 2), root=tmp_path, verbose=False)
    with run, pytest.raises(ConfigError, match=r"give ScalarLog\(run, log_to="):
        ScalarLog(run).write(0)
