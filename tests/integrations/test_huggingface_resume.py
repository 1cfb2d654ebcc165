"""Trainings that are resumed from a checkpoint of the Trainer, the last one or an older one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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


class Scaling(Trainer):
    """Has a gradient scaler, as float16 on a GPU brings one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


class Overflowing(Scaling):
    """Its scaler skips the first step, since the second batch overflows."""

    backwards = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.backwards += 1
        if self.backwards == 2:
            gradient = next(self.model.parameters()).grad
            assert gradient is not None
            gradient[0, 0] = torch.inf
        return loss


def test_a_skipped_step_is_none_also_when_training_is_resumed(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"gradient_accumulation_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-6}
    begun, callback = trainer(tmp_path, Overflowing, save_steps=4, **changes)
    begun.train()
    store = callback.run.store
    assert np.flatnonzero(store.flags & Flag.OVERFLOW).tolist() == [0, 1, 2, 3]
    assert list(store.step) == [0] * 8 + [1] * 3 + [2] * 4 + [3] * 4 + [4] * 3
    data = s.sentences()
    assert s.relative_error(store.gradients[4:], s.own_rows(s.llama(), store, data)[4:]) <= 1e-3
    again, callback = trainer(tmp_path, Scaling, save_strategy="no", **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-4"))
    store = callback.run.store
    kept = np.flatnonzero((store.flags & Flag.SUPERSEDED) == 0)
    assert list(store.step[kept]) == [0] * 8 + [1] * 3 + [2] * 4 + [3] * 4 + [4] * 3


def test_a_training_is_resumed_in_a_store_at_a_url(tmp_path: Path) -> None:
    place = {"store": {"dtype": "float64", "url": (tmp_path / "elsewhere").as_uri()}}
    for start in (None, str(tmp_path / "trainer" / "checkpoint-4")):
        callback = LogixCallback("run", root=tmp_path, verbose=False, **{**s.IDENTITY, **place})
        arguments = s.arguments(tmp_path, save_strategy="no" if start else "steps", save_steps=4)
        fitted = Trainer(s.llama(), arguments, train_dataset=s.sentences(), callbacks=[callback])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fitted.train(resume_from_checkpoint=start)
    assert np.count_nonzero(callback.run.store.valid) == 22
