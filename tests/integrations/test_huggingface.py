"""The callback of the Hugging Face Trainer stores each sample's own gradient, and changes nothing."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import datasets
from logix_like.integrations.huggingface import LogixCallback
from transformers import Trainer

import logix_like as logix
from logix_like.errors import CaptureError, ConfigError, StoreExistsError
from logix_like.ids import as_data_ids
from tests.integrations import sentences as s

FLOAT32 = 2e-5
"""Models and losses of transformers compute in float32 at least in part."""
BFLOAT16 = 3e-2
"""Autocast rounds each product to 8 bits."""


class Scaled(Trainer):
    """Multiplies its loss, as a gradient scaler does."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * 1024


class OwnLoss(Trainer):
    """Computes a loss of its own from the logits."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return model(**inputs).logits.square().mean()


class Probing(Trainer):
    """Reads its own loader in the midst of a pass, and throws away what it reads."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        for number in range(self.state.global_step):
            assert next(iter(self.callback_handler.train_dataloader)), number
        return super().training_step(*args, **kwargs)


class Counting(Trainer):
    """Reads all of its own loader in the midst of a pass."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.state.global_step or len(list(self.callback_handler.train_dataloader)) == 6
        return super().training_step(*args, **kwargs)


class Twice(Trainer):
    """Calls the model twice for one batch."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return model(**inputs).loss + model(**inputs).loss


CONDITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation of three": {"gradient_accumulation_steps": 3},
    "scaled loss": {"kind": Scaled, "gradient_accumulation_steps": 2},
    "loader read twice at once": {"kind": Probing, "gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 1e-3},
    "group by length": {"train_sampling_strategy": "group_by_length"},
    "batches by length": {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2},
    "dropped last batch": {"dataloader_drop_last": True},
    "two workers": {"dataloader_num_workers": 2},
    "checkpointing": {"activation_checkpointing": True},
    "re-entrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bfloat16 autocast": {"bf16": True, "gradient_accumulation_steps": 2},
    "evaluation in between": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "trainer": {"eval_dataset": s.sentences(4)},
    },
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_rows_are_the_samples_own_gradients(tmp_path: Path, condition: str) -> None:
    settings, data = CONDITIONS[condition], s.sentences()
    store = s.trained(tmp_path, s.llama(), data, **settings).run.store
    visits = Counter(store.data_id)
    assert len(store) == (20 if condition == "dropped last batch" else 22)
    assert set(visits.values()) <= {1, 2} and len(visits) == s.SAMPLES
    error = s.relative_error(store.gradients[:], s.own_rows(s.llama(), store, data))
    assert error <= (BFLOAT16 if "bfloat16" in condition else FLOAT32)


def test_a_loader_that_is_read_by_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="something else reads it as well"):
        s.trained(tmp_path, s.llama(), s.sentences(), kind=Counting)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_rows_of_a_model_with_tied_weights_and_a_loss_of_no_named_kind(tmp_path: Path, accumulated: int) -> None:
    modules = {"types": ["Conv1D", "Linear", "Embedding"], "exclude": ["*.wpe"]}
    data = s.sentences()
    store = s.trained(
        tmp_path, s.gpt2(), data, gradient_accumulation_steps=accumulated, callback={"modules": modules}
    ).run.store
    assert s.relative_error(store.gradients[:], s.own_rows(s.gpt2(), store, data)) <= FLOAT32


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("classes", [1, 3])
def test_rows_of_classification_and_regression(tmp_path: Path, classes: int, accumulated: int) -> None:
    network, data = s.bert(classes), s.labelled(classes=classes)
    store = s.trained(tmp_path, network, data, gradient_accumulation_steps=accumulated).run.store
    assert s.relative_error(store.gradients[:], s.own_rows(network, store, data)) <= FLOAT32


def test_steps_epochs_and_learning_rates(tmp_path: Path) -> None:
    run = s.trained(tmp_path, s.llama(), s.sentences(), gradient_accumulation_steps=2, learning_rate=1e-3).run
    store = run.store
    assert Counter(store.step) == {0: 4, 1: 4, 2: 3, 3: 4, 4: 4, 5: 3}
    assert list(store.epoch) == [0] * 11 + [1] * 11
    assert store.lr[0] == 1e-3
    assert store.lr[-1] < store.lr[0]


def test_the_bare_loop_stores_the_same(tmp_path: Path) -> None:
    data, network, torch_seed = s.sentences(12), s.llama(), 5
    bare = copy.deepcopy(network)
    store = s.trained(
        tmp_path / "hf", network, data, learning_rate=0.05, optim="sgd", seed=torch_seed, max_grad_norm=0,
        lr_scheduler_type="constant",
    ).run.store  # fmt: skip
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.05)
    run = logix.init(
        "run", bare, s.IDENTITY, root=tmp_path / "bare", optimizer=optimizer, loss_reduction="token_mean", verbose=False
    )
    bare.train()
    for epoch in range(2):
        run.epoch(epoch)
        for first in range(epoch * 12, epoch * 12 + 12, 2):
            ids = store.data_id[first : first + 2]
            batch = {name: torch.stack([data[i][name] for i in ids]) for name in data[0]}
            counted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].ne(-100)
            with run(data_id=list(ids), mask=counted):
                bare(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    run.finalize()
    assert list(run.store.data_id) == list(store.data_id)
    assert list(run.store.step) == list(store.step)
    assert list(run.store.epoch) == list(store.epoch)
    assert list(run.store.lr) == list(store.lr)
    assert torch.equal(run.store.gradients[:], store.gradients[:])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_training_is_not_changed(tmp_path: Path, accumulated: int) -> None:
    ends = []
    for name in ("plain", "logged"):
        model = s.bert(dropout=0.2)
        callbacks = [LogixCallback("run", root=tmp_path, verbose=False)] if name == "logged" else []
        arguments = s.arguments(tmp_path / name, learning_rate=1e-2, gradient_accumulation_steps=accumulated)
        trainer = Trainer(model, arguments, train_dataset=s.labelled(), callbacks=callbacks)
        trainer.train()
        ends.append((model.state_dict(), trainer.optimizer.state_dict()["state"], torch.get_rng_state()))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    plain, logged = ends
    assert list(plain[0]) == list(logged[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[0].values(), logged[0].values(), strict=True))
    for number, state in plain[1].items():
        assert all(torch.equal(value, logged[1][number][key]) for key, value in state.items())
    assert torch.equal(plain[2], logged[2])


def named_dataset() -> datasets.Dataset:
    data = s.sentences()
    columns = {name: [sample[name].tolist() for sample in data] for name in data[0]}
    dataset = datasets.Dataset.from_dict({**columns, "verse": [f"v{i}" for i in range(len(data))]})
    return dataset


def test_a_column_names_the_samples_though_the_trainer_removes_it(tmp_path: Path) -> None:
    dataset, network = named_dataset(), s.llama()
    store = s.trained(
        tmp_path, network, dataset, num_train_epochs=1, callback={"data_id": "verse", "dataset": dataset}
    ).run.store
    assert sorted(store.data_id) == sorted(dataset["verse"])
    store_of_indices = s.trained(tmp_path / "by index", network, dataset, num_train_epochs=1).run.store
    assert [f"v{i}" for i in store_of_indices.data_id] == list(store.data_id)
    assert torch.equal(store.gradients[:], store_of_indices.gradients[:])


def test_a_column_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data_id='verse' names no column .*give the dataset too"):
        s.trained(tmp_path, s.llama(), named_dataset(), callback={"data_id": "verse"})


def test_names_may_repeat_within_a_batch(tmp_path: Path) -> None:
    names = ["same"] * s.SAMPLES
    store = s.trained(tmp_path, s.llama(), s.sentences(), num_train_epochs=1, callback={"data_id": names}).run.store
    assert list(store.data_id) == names


WRONG_NAMES: dict[str, tuple[Any, str]] = {
    "too few": (["a", "b"], "holds 2 names, and the training data 11 samples"),
    "too many": (list(range(50)), "holds 50 names"),
    "a number": (3, "data_id is a int"),
    "a mapping": ({0: "a"}, "data_id is a dict"),
    "fractions": ([0.5] * s.SAMPLES, r"cannot name the samples: the data id 0\.5 is a float"),
    "a column of tensors": ("input_ids", "cannot name the samples"),
}


@pytest.mark.parametrize("case", WRONG_NAMES)
def test_names_that_cannot_be_the_samples_are_said_before_training(tmp_path: Path, case: str) -> None:
    names, said = WRONG_NAMES[case]
    with pytest.raises(ConfigError, match=said):
        s.trained(tmp_path, s.llama(), s.sentences(), callback={"data_id": names})
    assert not (tmp_path / "run").exists()


def test_a_function_names_the_samples(tmp_path: Path) -> None:
    def first_tokens(batch: Any) -> list[str]:
        return [f"t{tokens[0]}" for tokens in batch["input_ids"].tolist()]

    store = s.trained(
        tmp_path, s.llama(), s.sentences(), num_train_epochs=1, callback={"data_id": first_tokens}
    ).run.store
    assert Counter(store.data_id) == Counter(f"t{sample['input_ids'][0]}" for sample in s.sentences())


class Stream(IterableDataset[Any]):
    """Samples one after another, without a length."""

    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


def test_samples_of_a_stream_are_named_by_their_content(tmp_path: Path) -> None:
    data, network = s.sentences(), s.llama()
    store = s.trained(tmp_path, network, Stream(data), max_steps=6).run.store
    tokens = torch.stack([sample["input_ids"] for sample in data])
    names = as_data_ids(tokens, torch.stack([sample["attention_mask"] for sample in data]))
    assert list(store.data_id) == list(names)
    own = s.own_rows(network, store, dict(zip(names, data, strict=True)))
    assert s.relative_error(store.gradients[:], own) <= FLOAT32


def test_a_stream_cannot_be_named_by_a_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="iterable dataset"):
        s.trained(tmp_path, s.llama(), Stream(s.sentences()), max_steps=2, callback={"data_id": "verse"})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_tracked_by_default(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    network, data = peft.get_peft_model(s.llama(), adapters), s.sentences()
    store = s.trained(tmp_path, network, data, gradient_accumulation_steps=2).run.store
    assert all("lora_" in block.name for block in store.modules)
    assert len(store.modules) == 8
    assert s.relative_error(store.gradients[:], s.own_rows(network, store, data)) <= FLOAT32


def test_queries_after_training_and_in_a_later_process(tmp_path: Path) -> None:
    network, data = s.llama(), s.sentences()
    run = s.trained(tmp_path, network, data, num_train_epochs=1).run
    later = logix.load(tmp_path / "run", model=network)
    for asked in (run, later):
        with asked.query(data_id=["q"]) as query:
            network(**{name: value[None] for name, value in data[3].items()}).loss.backward()
        result = asked.compute_influence_all(query, preconditioner="identity", mode="cosine", k=1)
        assert result.proponents().ids[0, 0] == 3


@pytest.mark.parametrize("kind", [OwnLoss, Twice])
def test_a_loss_that_cannot_be_read_is_refused(tmp_path: Path, kind: type[Trainer]) -> None:
    expected = "not the one that the model returned" if kind is OwnLoss else "called twice in one training step"
    callback = LogixCallback("run", root=tmp_path, verbose=False)
    trainer = kind(s.llama(), s.arguments(tmp_path), train_dataset=s.sentences(), callbacks=[callback])
    with pytest.raises(CaptureError, match=expected):
        trainer.train()
    callback.close()


def test_a_trainer_already_trained_is_said(tmp_path: Path) -> None:
    callback = LogixCallback("run", root=tmp_path, verbose=False)
    trainer = Trainer(s.llama(), s.arguments(tmp_path), train_dataset=s.sentences(), callbacks=[callback])
    trainer.train()
    with pytest.raises(CaptureError, match="has logged a training already"):
        trainer.train()
    with pytest.raises(StoreExistsError):
        s.trained(tmp_path, s.llama(), s.sentences())


def test_a_callback_needs_a_project() -> None:
    with pytest.raises(ConfigError, match="no project is named"):
        LogixCallback()
    with pytest.raises(CaptureError, match=r"begins with trainer.train\(\)"):
        _ = LogixCallback("run").run
