"""The callbacks leave the trainers' own progress bars as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lightning")

from logix_like.integrations import huggingface, lightning
from torch.utils.data import DataLoader
from transformers import Trainer

from tests.integrations import sentences as s
from tests.integrations.test_lightning import Classifier, trainer

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning.*", "ignore:.*LeafSpec.*")

LOGGED: dict[str, Any] = {"projection": {"rank": 2}}


def bars(text: str) -> tuple[int, list[str]]:
    """How many lines a terminal has kept, and the first and last count of its bars (those between go by the clock)."""
    counts: list[str] = re.findall(r"\b\d+/\d+\b", text)
    return text.count("\n"), [*counts[:1], *counts[-1:]]


def test_of_hugging_face(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = []
    for logged in (False, True):
        callbacks = [huggingface.LogixCallback("run", root=tmp_path, **LOGGED)] if logged else []
        arguments = s.arguments(tmp_path, disable_tqdm=False)
        Trainer(s.llama(), arguments, train_dataset=s.sentences(), callbacks=callbacks).train()
        shown.append(capfd.readouterr())
    told = [line for line in shown[1].err.splitlines() if "logix" in line]
    assert len(told) == 1  # what is tracked, above the bar
    assert bars(shown[1].err.replace(told[0] + "\n", "")) == bars(shown[0].err)
    assert bars(shown[0].err)[1] == ["0/12", "12/12"]
    assert bars(shown[1].out) == bars(shown[0].out)


def test_of_lightning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = []
    for logged in (False, True):
        callbacks = [lightning.LogixCallback("run", root=tmp_path, verbose=False, **LOGGED)] if logged else []
        module = Classifier()
        trainer(tmp_path, *callbacks, enable_progress_bar=True).fit(module, DataLoader(module.dataset, 5))
        shown.append(capfd.readouterr())
    assert bars(shown[1].out) == bars(shown[0].out)
    assert bars(shown[1].err) == bars(shown[0].err)
    assert bars(shown[0].out + shown[0].err)[1]
