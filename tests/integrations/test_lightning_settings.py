"""Settings of Lightning's Trainer that change which batches are trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

pytest.importorskip("lightning")

import lightning
from logix_like.integrations.lightning import LogixCallback

from logix_like.errors import CaptureError
from tests.integrations.test_lightning import FLOAT32, IDENTITY, Classifier, logged, relative_error, trainer
from tests.training import SAMPLES, data

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning.*", "ignore:.*LeafSpec.*")

QUIET: dict[str, Any] = {"verbose": False, **IDENTITY}

SETTINGS: dict[str, tuple[dict[str, Any], int]] = {
    "a development run": ({"fast_dev_run": 2}, 10),
    "some of the batches": ({"limit_train_batches": 3}, 30),
    "a number of steps": ({"max_steps": 7}, 33),
    "a sanity check": (
        {"num_sanity_val_steps": 2, "validation": DataLoader(TensorDataset(*data(torch.float32)), 5)},
        46,
    ),
    "batches to be overfitted": ({"overfit_batches": 2}, 20),
    "inference mode off": ({"inference_mode": False}, 46),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_are_those_that_were_trained_on(tmp_path: Path, name: str) -> None:
    settings, rows = SETTINGS[name]
    seen: list[int] = []
    x = data(torch.float32)[0]

    class Watched(Classifier):
        def training_step(self, batch: list[Tensor], number: int) -> Any:
            seen.extend(int((x == row).all(1).nonzero()) for row in batch[0])
            return {"loss": self.loss(batch)}

    module = Watched()
    store = logged(tmp_path, module, **settings)
    assert list(store.data_id) == seen
    assert len(store) == rows
    assert relative_error(store, module) <= FLOAT32


def test_the_loader_is_read_by_validation_too(tmp_path: Path) -> None:
    """In the midst of a pass of training, and not to its end."""
    module = Classifier()
    loader, kept = DataLoader(module.dataset, 5, shuffle=True), LogixCallback("run", root=tmp_path, **QUIET)
    settings: dict[str, Any] = {"val_check_interval": 2, "limit_val_batches": 2, "num_sanity_val_steps": 1}
    trainer(tmp_path, kept, **settings).fit(module, loader, loader)
    assert sorted(kept.run.store.data_id) == sorted([*range(SAMPLES)] * 2)
    assert relative_error(kept.run.store, module) <= FLOAT32


@pytest.mark.parametrize("given", [True, False])
def test_two_callbacks_leave_the_loader_as_it_was(tmp_path: Path, given: bool) -> None:
    class Loading(Classifier):
        def train_dataloader(self) -> Any:
            return loader

    module = Loading()
    loader = DataLoader(module.dataset, 5, shuffle=True)
    sampler, callbacks = loader.batch_sampler, [LogixCallback(name, root=tmp_path, **QUIET) for name in "ab"]
    trainer(tmp_path, *callbacks).fit(module, *([loader] if given else []))
    assert loader.batch_sampler is sampler
    for callback in callbacks:
        assert relative_error(callback.run.store, module) <= FLOAT32


class Shrinking(lightning.Callback):
    """Changes the batch size of the loader's own sampler behind the first epoch."""

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        trainer.train_dataloader.batch_sampler.batch_size = 3


def test_a_batch_size_that_changes_in_training_does_so_with_the_callback(tmp_path: Path) -> None:
    module = Classifier()
    loader, kept = DataLoader(module.dataset, 5, shuffle=True), LogixCallback("run", root=tmp_path, **QUIET)
    trainer(tmp_path, Shrinking(), kept).fit(module, loader)
    assert loader.batch_sampler.batch_size == 3
    # Lightning counts the batches of an epoch once.
    assert list(Counter(kept.run.store.step).values()) == [5, 5, 5, 5, 3, *[3] * 5]
    assert relative_error(kept.run.store, module) <= FLOAT32


def test_loaders_that_are_made_anew_each_epoch(tmp_path: Path) -> None:
    class Growing(Classifier):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.dataset, batch_size=5 + self.current_epoch, shuffle=True)

    module = Growing()
    store = logged(tmp_path, module, reload_dataloaders_every_n_epochs=1)
    assert list(Counter(store.step).values()) == [5, 5, 5, 5, 3, 6, 6, 6, 5]
    assert relative_error(store, module) <= FLOAT32


def test_a_module_without_optimizers(tmp_path: Path) -> None:
    class Unmoved(Classifier):
        def configure_optimizers(self) -> Any:
            return None

    module = Unmoved()
    store = logged(tmp_path, module, max_epochs=1)
    assert np.isnan(store.lr).all()
    assert relative_error(store, module) <= FLOAT32


def test_backward_passes_that_lightning_is_not_told_of_are_said(tmp_path: Path) -> None:
    class Own(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], number: int) -> None:
            self.loss(batch).backward()

    with pytest.raises(CaptureError, match=r"loss.backward\(\).*call self.manual_backward\(loss\)"):
        logged(tmp_path, Own())


def test_a_batch_that_is_not_trained_on_is_not_logged(tmp_path: Path) -> None:
    class Skipping(Classifier):
        def training_step(self, batch: list[Tensor], number: int) -> Tensor | None:
            return None if number == 1 else self.loss(batch)

    module = Skipping()
    store = logged(tmp_path, module, max_epochs=1)
    assert len(store) == SAMPLES - 5
    assert relative_error(store, module) <= FLOAT32


def test_several_loaders_need_a_function(tmp_path: Path) -> None:
    class Several(Classifier):
        def train_dataloader(self) -> Any:
            return {"a": DataLoader(self.dataset, batch_size=5), "b": DataLoader(self.dataset, batch_size=5)}

        def training_step(self, batch: Any, number: int) -> Tensor:
            return self.loss(batch["a"])

    with pytest.raises(CaptureError, match="from a dict, not from one DataLoader"):
        logged(tmp_path, Several())

    def numbers(batch: Any) -> Iterator[int]:
        return iter(range(len(batch["a"][0])))

    store = logged(tmp_path, Several(), max_epochs=1, callback={"data_id": numbers, "overwrite": True})
    assert len(store) == SAMPLES


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_rows_before_it_was_broken_off_are_kept(tmp_path: Path, error: type[BaseException]) -> None:
    class Broken(Classifier):
        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            if number == 2:
                raise error("broken")
            return self.loss(batch)

    kept, module = LogixCallback("run", root=tmp_path, verbose=False), Broken()
    with pytest.raises((error, SystemExit)):
        trainer(tmp_path, kept).fit(module)
    assert len(kept.run.store) == 10
    module.loss([*data(torch.float32)]).backward()
    assert not any(layer._forward_hooks for layer in module.modules())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_its_collator_leaves_out_takes_its_names_along(tmp_path: Path, workers: int) -> None:
    """Where a sample cannot be read the whole batch is often given up so; Lightning trains on nothing then."""

    def without_third(samples: list[Any]) -> Any:
        left_out = any(bool((x == data(torch.float32)[0][3]).all()) for x, _ in samples)
        return None if left_out else default_collate(samples)

    module = Classifier()
    loader = DataLoader(module.dataset, 5, shuffle=True, collate_fn=without_third, num_workers=workers)
    store = logged(tmp_path, module, loader)
    assert len(store) in (36, 38, 40)
    assert 3 not in set(store.data_id)
    assert relative_error(store, module) <= FLOAT32


def test_an_epoch_that_the_module_ends_early(tmp_path: Path) -> None:
    class Ending(Classifier):
        def on_train_batch_start(self, batch: list[Tensor], number: int) -> int | None:
            return -1 if number == 2 else None

        def on_train_epoch_end(self) -> None:
            self.loss([*data(torch.float32)]).backward()  # belongs to no batch

    module = Ending()
    store = logged(tmp_path, module)
    assert len(store) == 20
    assert relative_error(store, module) <= FLOAT32


def test_a_step_that_reads_its_batches_itself_is_refused(tmp_path: Path) -> None:
    def reading(module: Classifier, dataloader_iter: Iterator[Any]) -> Tensor:
        return module.loss(next(dataloader_iter)[0])

    with pytest.raises(CaptureError, match=r"takes dataloader_iter .* have it take \(batch, batch_idx\)"):
        logged(tmp_path, type("Reading", (Classifier,), {"training_step": reading})())


@pytest.mark.parametrize("way", ["validate", "test"])
def test_a_checkpoint_that_is_looked_at_is_none_to_go_on_from(tmp_path: Path, way: str) -> None:
    class Tested(Classifier):
        def test_step(self, batch: list[Tensor], number: int) -> None:
            self.loss(batch)

    checkpoint, validation = tmp_path / "first.ckpt", DataLoader(TensorDataset(*data(torch.float32)), 5)
    first = LogixCallback("run", root=tmp_path, **QUIET)
    begun = trainer(tmp_path, first, max_epochs=1)
    begun.fit(Tested())
    begun.save_checkpoint(checkpoint)
    fresh = LogixCallback("run", root=tmp_path, overwrite=True, **QUIET)
    again = trainer(tmp_path, fresh, max_epochs=1)
    getattr(again, way)(Tested(), validation, ckpt_path=checkpoint)
    again.fit(Tested())
    assert list(Counter(fresh.run.store.step)) == [0, 1, 2, 3, 4]
    assert len(fresh.run.store) == SAMPLES


def test_one_callback_goes_on_from_a_checkpoint_and_does_not_begin_again(tmp_path: Path) -> None:
    checkpoint, module = tmp_path / "first.ckpt", Classifier()
    kept = LogixCallback("run", root=tmp_path, **QUIET)
    fitted = trainer(tmp_path, kept, max_epochs=1)
    fitted.fit(module)
    fitted.save_checkpoint(checkpoint)
    fitted.fit_loop.max_epochs = 2
    fitted.fit(module, ckpt_path=checkpoint)
    store = kept.run.store
    assert list(store.epoch) == [0] * SAMPLES + [1] * SAMPLES
    assert relative_error(store, module) <= FLOAT32
    fitted.fit_loop.max_epochs = 3
    with pytest.raises(CaptureError, match=r"has logged a training already.*or resume with ckpt_path"):
        fitted.fit(module)
    assert len(kept.run.store) == 2 * SAMPLES


def test_a_sampler_of_something_else_than_indices(tmp_path: Path) -> None:
    """As where each sample is asked for with its size."""

    class Sizes(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            return data(torch.float32)[0][index[0]], data(torch.float32)[1][index[0]]

    sampler: Any = [[(0, 64), (1, 64)], [(2, 32)]]
    loader: Any = DataLoader(Sizes(range(3)), batch_sampler=sampler)
    with pytest.raises(CaptureError, match=r"hands out \(0, 64\), which is no dataset index; name the samples"):
        logged(tmp_path, Classifier(), loader)
    names = {"data_id": lambda batch: range(len(batch[0])), "overwrite": True}
    assert len(logged(tmp_path, Classifier(), loader, callback=names, max_epochs=1)) == 3
