"""The callback of Lightning's Trainer stores each sample's own gradient, and changes nothing."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.plugins import MixedPrecision
from logix_like.integrations.lightning import LogixCallback

import logix_like as logix
from logix_like.errors import CaptureError, ConfigError, StoreExistsError
from tests.training import CLASSES, FEATURES, SAMPLES, data, linear_gradient, network, own_gradients

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning.*", "ignore:.*LeafSpec.*")

FLOAT32 = 1e-5
LENGTH = 4
BFLOAT16 = 5e-2
"""Autocast rounds each product to 8 bits."""
IDENTITY: dict[str, Any] = {"projection": {"init": "identity"}, "store": {"dtype": "float64"}}


class Classifier(lightning.LightningModule):
    """A small network with its data."""

    def __init__(self, lr: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = network(torch.float32)
        self.drop = nn.Dropout(dropout)
        self.lr = lr
        self.dataset = TensorDataset(*data(torch.float32))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=5, shuffle=True)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.drop(self.net(batch[0])), batch[1])

    def training_step(self, batch: list[Tensor], number: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        self.log("loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9 if self.lr else 0.0)


class Recurrent(Classifier):
    """Padded sequences, each position to be classified; the loss is the mean over the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        sequences = torch.randn(SAMPLES, LENGTH, FEATURES, generator=generator)
        lengths = torch.randint(1, LENGTH + 1, (SAMPLES, 1), generator=generator)
        self.dataset = TensorDataset(sequences, torch.arange(LENGTH) < lengths)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, counted = batch
        labels = torch.where(counted, x[..., :CLASSES].argmax(-1), -100)
        return F.cross_entropy(self.net(x).flatten(0, 1), labels.flatten())

    def own_rows(self, store: Any) -> Tensor:
        """Each stored row's sample's gradient of its summed token loss."""
        rows = []
        for i in store.data_id:
            self.zero_grad()
            x, counted = (part[None] for part in self.dataset[int(i)])
            (self.loss([x, counted]) * counted.sum()).backward()
            rows.append(torch.cat([linear_gradient(m).flatten() for m in (self.net[0], self.net[2])]))
        return torch.stack(rows)


class Checkpointed(Classifier):
    """Its first layers are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def loss(self, batch: list[Tensor]) -> Tensor:
        inner: Any = checkpoint(self.net[:2], batch[0].requires_grad_(), use_reentrant=self.reentrant)
        return F.cross_entropy(self.net[2](inner), batch[1])


class Manual(Classifier):
    """Steps by itself, with two optimizers and one loss for each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in (self.net[0], self.net[2])]

    def training_step(self, batch: list[Tensor], number: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "default_root_dir": folder, "max_epochs": 2, "accelerator": "cpu", "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return lightning.Trainer(callbacks=list(callbacks), **(defaults | settings))


def logged(folder: Path, module: Any, *loaders: Any, callback: dict[str, Any] | None = None, **settings: Any) -> Any:
    """The store of a finished training."""
    kept = LogixCallback("run", root=folder, verbose=False, **{**IDENTITY, **(callback or {})})
    validation = settings.pop("validation", None)
    trainer(folder, kept, **settings).fit(module, *loaders, val_dataloaders=validation)
    return kept.run.store


def relative_error(store: Any, module: Classifier) -> float:
    own = own_gradients(module.net, *data(torch.float32))[[int(i) for i in store.data_id]]
    return float(((store.gradients[:] - own).norm(dim=1) / own.norm(dim=1)).max())


def scaled() -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


CONDITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 1e-3},
    "validation in between": {
        "validation": DataLoader(TensorDataset(*data(torch.float32)), 5),
        "val_check_interval": 2,
    },
    "bfloat16 autocast": {"precision": "bf16-mixed"},
    "float16 with a scaler": {"plugins": [], "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_rows_are_the_samples_own_gradients(tmp_path: Path, condition: str) -> None:
    settings = dict(CONDITIONS[condition])
    if "plugins" in settings:
        settings["plugins"] = [scaled()]
    module = Classifier()
    store = logged(tmp_path, module, **settings)
    assert Counter(store.data_id) == dict.fromkeys(range(SAMPLES), 2)
    assert list(store.epoch) == [0] * SAMPLES + [1] * SAMPLES
    assert relative_error(store, module) <= (BFLOAT16 if "float16" in condition else FLOAT32)


def test_every_backward_pass_of_manual_optimization_is_a_visit(tmp_path: Path) -> None:
    module = Manual()
    store = logged(tmp_path, module, max_epochs=1)
    assert Counter(store.data_id) == dict.fromkeys(range(SAMPLES), 2)
    assert relative_error(store, module) <= FLOAT32


@pytest.mark.parametrize("reentrant", [True, False])
def test_rows_of_a_checkpointed_module(tmp_path: Path, reentrant: bool) -> None:
    module = Checkpointed(reentrant)
    store = logged(tmp_path, module, accumulate_grad_batches=2)
    assert Counter(store.data_id) == dict.fromkeys(range(SAMPLES), 2)
    assert relative_error(store, module) <= FLOAT32


@pytest.mark.parametrize("accumulated", [1, 2])
def test_rows_of_padded_sequences(tmp_path: Path, accumulated: int) -> None:
    module = Recurrent()
    callback = {"mask": lambda batch: batch[1], "loss_reduction": "token_mean", "statistics": ["kronecker"]}
    store = logged(tmp_path, module, callback=callback, accumulate_grad_batches=accumulated, max_epochs=1)
    own = module.own_rows(store)
    assert float(((store.gradients[:] - own).norm(dim=1) / own.norm(dim=1)).max()) <= FLOAT32
    counted = int(module.dataset.tensors[1].sum())
    assert store.statistics.sums["net.0"]["positions"] == counted


def test_steps_count_the_optimizers(tmp_path: Path) -> None:
    store = logged(tmp_path, Classifier(), accumulate_grad_batches=2)
    assert Counter(store.step) == {0: 10, 1: 10, 2: 3, 3: 10, 4: 10, 5: 3}


def test_the_bare_loop_stores_the_same(tmp_path: Path) -> None:
    store = logged(tmp_path / "lightning", Classifier(lr=0.1))
    module = Classifier(lr=0.1)
    optimizer = module.configure_optimizers()
    x, y = data(torch.float32)
    run = logix.init("run", module, IDENTITY, root=tmp_path / "bare", optimizer=optimizer, verbose=False)
    for epoch in range(2):
        run.epoch(epoch)
        for ids in torch.tensor(store.data_id[epoch * SAMPLES : (epoch + 1) * SAMPLES].astype(int)).split(5):
            with run(data_id=ids):
                module.loss([x[ids], y[ids]]).backward()
            optimizer.step()
            optimizer.zero_grad()
    run.finalize()
    for column in ("data_id", "step", "epoch", "lr"):
        assert list(getattr(run.store, column)) == list(getattr(store, column))
    assert torch.equal(run.store.gradients[:], store.gradients[:])


def test_training_is_not_changed(tmp_path: Path) -> None:
    ends = []
    for name in ("plain", "logged"):
        torch.manual_seed(0)
        module = Classifier(lr=0.1, dropout=0.2)
        callbacks = [LogixCallback("run", root=tmp_path, verbose=False)] if name == "logged" else []
        fitted = trainer(tmp_path, *callbacks, gradient_clip_val=0.5, accumulate_grad_batches=2)
        fitted.fit(module)
        state = [*module.state_dict().values(), torch.get_rng_state()]
        state += [entry["momentum_buffer"] for entry in fitted.optimizers[0].state.values()]
        ends.append(state)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_loader_with_workers(tmp_path: Path) -> None:
    module = Classifier()
    loader = DataLoader(module.dataset, batch_size=5, shuffle=True, num_workers=2)
    sampler = loader.batch_sampler
    store = logged(tmp_path, module, loader)
    assert relative_error(store, module) <= FLOAT32
    assert loader.batch_sampler is sampler


def test_workers_that_began_before_the_callback_are_said(tmp_path: Path) -> None:
    class Late(Classifier):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.dataset, batch_size=5, num_workers=1)

    with pytest.raises(CaptureError, match="workers, which have read batches before"):
        logged(tmp_path, Late())
    store = logged(tmp_path, Late(), callback={"data_id": lambda batch: batch[1] * 0})
    assert set(store.data_id) == {0}


class Stream(IterableDataset[Any]):
    """Samples without indices."""

    def __iter__(self) -> Iterator[Any]:
        return iter(TensorDataset(*data(torch.float32)))


def test_a_stream_without_tokens_needs_a_function(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="iterable dataset"):
        logged(tmp_path, Classifier(), DataLoader(Stream(), batch_size=5))

    def first(batch: list[Tensor]) -> list[str]:
        return [f"{value:.4f}" for value in batch[0][:, 0].tolist()]

    store = logged(
        tmp_path, Classifier(), DataLoader(Stream(), batch_size=5), callback={"data_id": first, "overwrite": True}
    )
    assert Counter(store.data_id) == Counter(first([*data(torch.float32)]) * 2)


def resumed(folder: Path, checkpoint: Path, **settings: Any) -> Any:
    """The store after two trainings of a callback each: one that is broken off, one from ``checkpoint``."""
    again = LogixCallback("run", root=folder, verbose=False, **IDENTITY)
    trainer(folder, again, **settings).fit(Classifier(lr=0.1), ckpt_path=checkpoint)
    return again.run.store


def test_a_resumed_training_goes_on_behind_its_rows(tmp_path: Path) -> None:
    checkpoint = tmp_path / "first.ckpt"
    first = LogixCallback("run", root=tmp_path, verbose=False, **IDENTITY)
    begun = trainer(tmp_path, first, max_epochs=1, enable_checkpointing=True)
    begun.fit(Classifier(lr=0.1))
    begun.save_checkpoint(checkpoint)
    store = resumed(tmp_path, checkpoint)
    assert store.valid.all()
    assert Counter(store.data_id) == dict.fromkeys(range(SAMPLES), 2)
    assert list(store.epoch) == [0] * SAMPLES + [1] * SAMPLES
    assert sorted(set(store.step)) == list(range(10))


class Saving(lightning.Callback):
    """Saves a checkpoint behind a certain step, and notes how many rows were safe by then."""

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file, self.safe = step, file, -1

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not self.file.exists():
            trainer.save_checkpoint(self.file)
            self.safe = len(logix.open_store(self.file.parent / "run"))


@pytest.mark.parametrize("step", [3, 5, 7])
def test_rows_behind_an_older_checkpoint_are_taken_back(tmp_path: Path, step: int) -> None:
    """Also behind one in the midst of an epoch, where Lightning goes on with batches of a new order."""
    checkpoint = tmp_path / "older.ckpt"
    saving = Saving(step, checkpoint)
    first = LogixCallback("run", root=tmp_path, verbose=False, **IDENTITY)
    trainer(tmp_path, first, saving).fit(Classifier(lr=0.1))
    before = first.run.store
    assert saving.safe == {3: 15, 5: 23, 7: 33}[step]
    store = resumed(tmp_path, checkpoint)
    assert list(store.valid[: len(before)]) == list(before.step < step)
    kept = np.flatnonzero(store.valid)
    assert sorted(set(store.step[kept])) == list(range(10))
    assert list(store.epoch[kept]) == [int(number) // 5 for number in store.step[kept]]


def test_samples_of_an_epoch_resumed_in_its_midst_are_those_trained_on(tmp_path: Path) -> None:
    checkpoint, module = tmp_path / "midst.ckpt", Classifier()
    first = LogixCallback("run", root=tmp_path, verbose=False, **IDENTITY)
    trainer(tmp_path, first, Saving(3, checkpoint)).fit(module)
    again = LogixCallback("run", root=tmp_path, verbose=False, **IDENTITY)
    trainer(tmp_path, again).fit(module, ckpt_path=checkpoint)
    store = again.run.store
    assert np.count_nonzero(~store.valid) == 31
    assert relative_error(store, module) <= FLOAT32


def test_rows_before_an_exception_are_kept(tmp_path: Path) -> None:
    class Broken(Classifier):
        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            if number == 2:
                raise RuntimeError("broken")
            return self.loss(batch)

    kept = LogixCallback("run", root=tmp_path, verbose=False)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, kept).fit(Broken())
    assert len(kept.run.store) == 10


def test_batch_norm_is_warned_of_once_by_name(tmp_path: Path) -> None:
    class Coupled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logged(tmp_path, Coupled())
    said = [str(warning.message) for warning in caught if "batch normalisation" in str(warning.message)]
    assert len(said) == 1
    assert "net.1" in said[0]


def test_queries_after_training(tmp_path: Path) -> None:
    module = Classifier()
    kept = LogixCallback("run", root=tmp_path, verbose=False)
    trainer(tmp_path, kept, max_epochs=1).fit(module)
    x, y = data(torch.float32)
    for run in (kept.run, logix.load(tmp_path / "run", model=module)):
        with run.query(data_id=["q"]) as query:
            module.loss([x[3:4], y[3:4]]).backward()
        result = run.compute_influence_all(query, k=1, preconditioner="identity", mode="cosine")
        assert result.proponents().ids[0, 0] == 3


def test_a_second_training_is_said(tmp_path: Path) -> None:
    kept = LogixCallback("run", root=tmp_path, verbose=False)
    trainer(tmp_path, kept, max_epochs=1).fit(Classifier())
    with pytest.raises(CaptureError, match="has logged a training already"):
        trainer(tmp_path, kept, max_epochs=1).fit(Classifier())
    with pytest.raises(StoreExistsError):
        logged(tmp_path, Classifier())


def test_a_callback_needs_a_project() -> None:
    with pytest.raises(ConfigError, match="no project is named"):
        LogixCallback()
    with pytest.raises(CaptureError, match=r"begins with trainer.fit\(\)"):
        _ = LogixCallback("run").run
