"""Trainings that are resumed from a checkpoint of the Trainer, the last one or an older one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from logix_like.integrations.huggingface import LogixCallback
from transformers import Trainer

import logix_like as logix
from logix_like.store import Flag
from tests.integrations import sentences as s

FLOAT32 = 2e-5
"""Models and losses of transformers compute in float32 at least in part."""


def trainer(folder: Path, kind: type[Trainer] = Trainer, **changes: Any) -> tuple[Trainer, LogixCallback]:
    callback = LogixCallback("run", root=folder, verbose=False, **s.IDENTITY)
    settings: dict[str, Any] = {"learning_rate": 1e-2, "save_strategy": "steps", **changes}
    arguments = s.arguments(folder, **settings)
    return kind(s.llama(), arguments, train_dataset=s.sentences(), callbacks=[callback]), callback


def whole(folder: Path, **changes: Any) -> logix.GradientStore:
    plain, callback = trainer(folder / "whole", save_strategy="no", **changes)
    plain.train()
    return callback.run.store


def require_equal(store: logix.GradientStore, expected: logix.GradientStore) -> None:
    kept = np.flatnonzero(store.valid)
    for column in ("data_id", "step", "epoch"):
        assert list(getattr(store, column)[kept]) == list(getattr(expected, column))
    assert s.relative_error(store.gradients[kept], expected.gradients[:]) <= FLOAT32


@pytest.mark.parametrize("saved_at", [3, 6])
def test_a_resumed_training_goes_on_with_the_right_samples(tmp_path: Path, saved_at: int) -> None:
    class Killed(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == saved_at:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    broken, callback = trainer(tmp_path, Killed, save_steps=saved_at)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    callback.close()
    again, callback = trainer(tmp_path, save_steps=saved_at)
    again.train(resume_from_checkpoint=True)
    store = callback.run.store
    assert store.valid.all()
    require_equal(store, whole(tmp_path))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_rows_behind_an_older_checkpoint_are_taken_back(tmp_path: Path, accumulated: int) -> None:
    changes = {"gradient_accumulation_steps": accumulated}
    begun, callback = trainer(tmp_path, save_steps=2, **changes)
    begun.train()
    rows = len(callback.run.store)
    again, callback = trainer(tmp_path, save_strategy="no", **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-4"))
    store = callback.run.store
    assert np.count_nonzero(store.flags & Flag.SUPERSEDED) == rows - np.count_nonzero(store.step[:rows] < 4)
    require_equal(store, whole(tmp_path, **changes))


def test_rows_are_safe_when_a_checkpoint_is(tmp_path: Path) -> None:
    class Looking(LogixCallback):
        found = -1

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            super().on_save(*args, **kwargs)
            self.found = len(logix.open_store(tmp_path / "run"))

    callback = Looking("run", root=tmp_path, verbose=False)
    arguments = s.arguments(tmp_path, save_strategy="steps", save_steps=3, max_steps=3)
    Trainer(s.llama(), arguments, train_dataset=s.sentences(), callbacks=[callback]).train()
    assert callback.found == 6
