"""Trainings that an error breaks off: nobody need close the callback."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from logix_like.integrations.huggingface import LogixCallback
from torch import Tensor, nn
from transformers import Trainer

from logix_like.errors import CaptureError
from tests.integrations import sentences as s

FLOAT32 = 2e-5


class Breaking(Trainer):
    """Breaks off behind the forward pass of its third step, as where a GPU's memory is used up."""

    fits = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == 2 and not self.fits:
            raise KeyboardInterrupt
        return loss


class Greedy(Trainer):
    """Has memory for two samples."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) > 2 and model.training:
            raise RuntimeError("CUDA out of memory. Tried to allocate more")
        return loss


def broken_off(folder: Path, **changes: Any) -> tuple[Breaking, LogixCallback]:
    callback = LogixCallback("run", root=folder, verbose=False, **s.IDENTITY)
    arguments = s.arguments(folder, per_device_train_batch_size=2, **changes)
    trainer = Breaking(s.llama(), arguments, train_dataset=s.sentences(), callbacks=[callback])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer, callback


def hooks(model: nn.Module) -> int:
    return len(model._forward_hooks) + len(model._forward_pre_hooks)


def own_loop(model: nn.Module) -> Tensor:
    model.train()
    sample = {name: value[None] for name, value in s.sentences()[0].items()}
    loss: Tensor = model(**sample).loss
    loss.backward()
    return loss


def test_asking_for_the_run_ends_it(tmp_path: Path) -> None:
    trainer, callback = broken_off(tmp_path)
    assert hooks(trainer.model) == 2
    store = callback.run.store
    assert hooks(trainer.model) == 0
    assert len(store) == 4
    assert s.relative_error(store.gradients[:], s.own_rows(trainer.model, store, s.sentences())) < FLOAT32


def test_the_model_is_free_for_another_loop(tmp_path: Path) -> None:
    trainer, callback = broken_off(tmp_path)
    with pytest.warns(RuntimeWarning, match="broken off") as said:
        own_loop(trainer.model)
    assert len(said) == 1
    assert hooks(trainer.model) == 0
    own_loop(trainer.model)
    assert len(callback.run.store) == 4


@pytest.mark.parametrize("project", ["run", "other"])
def test_another_trainer_of_the_same_model(tmp_path: Path, project: str) -> None:
    """A notebook's cell is interrupted and run again."""
    trainer, first = broken_off(tmp_path)
    second = LogixCallback(project, root=tmp_path, verbose=False, overwrite=project == "run", **s.IDENTITY)
    arguments = s.arguments(tmp_path)
    Trainer(trainer.model, arguments, train_dataset=s.sentences(), callbacks=[second]).train()
    assert hooks(trainer.model) == 0
    assert sorted(second.run.store.data_id) == sorted([*range(s.SAMPLES)] * 2)
    assert len(first.run.store) == (4 if project == "other" else 2 * s.SAMPLES)


def test_a_store_that_is_gone_does_not_end_the_next_training(tmp_path: Path) -> None:
    trainer, _first = broken_off(tmp_path)
    rmtree(tmp_path / "run")
    second = LogixCallback("run", root=tmp_path, verbose=False, **s.IDENTITY)
    again = Trainer(trainer.model, s.arguments(tmp_path), train_dataset=s.sentences(), callbacks=[second])
    with pytest.warns(RuntimeWarning, match="its logging could not be ended"):
        again.train()
    assert len(second.run.store) == 2 * s.SAMPLES


def test_a_training_that_is_broken_off_within_another(tmp_path: Path) -> None:
    class Outer(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if not within:
                trainer, callback = broken_off(tmp_path / "inner")
                within.append(hooks(trainer.model))
                within.append(len(callback.run.store))
                within.append(hooks(trainer.model))
            return super().training_step(*args, **kwargs)

    within: list[int] = []
    outer = LogixCallback("run", root=tmp_path / "outer", verbose=False)
    Outer(s.llama(), s.arguments(tmp_path), train_dataset=s.sentences(), callbacks=[outer]).train()
    assert within == [2, 4, 0]
    assert len(outer.run.store) == 2 * s.SAMPLES


def test_a_training_that_was_broken_off_in_a_thread_that_is_gone(tmp_path: Path) -> None:
    found: list[tuple[Breaking, LogixCallback]] = []
    thread = Thread(target=lambda: found.append(broken_off(tmp_path)))
    thread.start()
    thread.join()
    (trainer, callback) = found[0]
    assert len(callback.run.store) == 4
    assert hooks(trainer.model) == 0


def test_training_again_is_refused_and_resuming_goes_on(tmp_path: Path) -> None:
    trainer, callback = broken_off(tmp_path, save_strategy="steps", save_steps=1)
    trainer.fits = 1
    with pytest.raises(CaptureError, match="again after it had been broken off"):
        trainer.train()
    assert hooks(trainer.model) == 0
    trainer.train(resume_from_checkpoint=True)
    store = callback.run.store
    assert store.valid.all()
    assert sorted(store.data_id) == sorted([*range(s.SAMPLES)] * 2)


def test_a_training_that_goes_on_is_asked_from_another_thread(tmp_path: Path) -> None:
    class Asked(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            thread = Thread(target=lambda: seen.append(callback.run))
            thread.start()
            thread.join()
            return super().training_step(*args, **kwargs)

    seen: list[Any] = []
    callback = LogixCallback("run", root=tmp_path, verbose=False)
    Asked(s.llama(), s.arguments(tmp_path), train_dataset=s.sentences(), callbacks=[callback]).train()
    assert len(callback.run.store) == 2 * s.SAMPLES
    assert all(run is callback.run for run in seen)


def test_a_batch_size_that_has_to_be_found(tmp_path: Path) -> None:
    callback = LogixCallback("run", root=tmp_path, verbose=False, **s.IDENTITY)
    arguments = s.arguments(tmp_path, per_device_train_batch_size=8, auto_find_batch_size=True, learning_rate=0.0)
    trainer = Greedy(s.llama(), arguments, train_dataset=s.sentences(), callbacks=[callback])
    trainer.train()
    store = callback.run.store
    assert sorted(store.data_id) == sorted([*range(s.SAMPLES)] * 2)
    assert s.relative_error(store.gradients[:], s.own_rows(trainer.model, store, s.sentences())) < FLOAT32
