"""Other tasks and settings of the Hugging Face Trainer: rows are each sample's own gradient all the same.

What a batch held is taken down where the Trainer computes its loss, so that a collator may draw numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import datasets
import transformers
from logix_like.integrations.huggingface import LogixCallback
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from logix_like.errors import CaptureError
from tests.integrations import sentences as s
from tests.models import LENGTH, VOCABULARY
from tests.reference_capture import full_rows

FLOAT32 = 2e-5
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {
    **SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager",
}  # fmt: skip


class Noting(Trainer):
    """Takes down each sample that it trains on, as the model sees it."""

    seen: list[dict[str, Tensor]]

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        for i in range(len(next(iter(inputs.values())))):
            self.seen.append({name: value[i].clone() for name, value in inputs.items()})
        return super().compute_loss(model, inputs, *args, **kwargs)


class NotingSequences(Noting, Seq2SeqTrainer):
    """The same for sequences to sequences."""


def tokenizer() -> Any:
    words = WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w1")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="w0", eos_token="w1", mask_token="w2"
    )


def drawn(shape: tuple[int, ...], labels: Callable[[int], Tensor], name: str = "pixel_values") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randn(shape, generator=generator), "labels": labels(i)} for i in range(s.SAMPLES)]


def sentences_with(labels: Callable[[s.Sample], Tensor]) -> list[dict[str, Tensor]]:
    return [{**sample, "labels": labels(sample)} for sample in s.sentences()]


def bert(head: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**BERT, **settings))
    return model


def masked_words() -> tuple[nn.Module, Any, dict[str, Any]]:
    data = [{"input_ids": sample["input_ids"][sample["attention_mask"].bool()].tolist()} for sample in s.sentences()]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.5)
    return bert("MaskedLM", tie_word_embeddings=False), data, {"data_collator": collator}


def translation() -> tuple[nn.Module, Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), s.sentences(), {"kind": NotingSequences}


def words_of_kinds() -> tuple[nn.Module, Any, dict[str, Any]]:
    data = sentences_with(lambda sample: torch.where(sample["labels"] < 0, -100, sample["labels"] % 3))
    return bert("TokenClassification", num_labels=3), data, {}


def several_labels() -> tuple[nn.Module, Any, dict[str, Any]]:
    data = sentences_with(lambda sample: (sample["input_ids"][:3] % 2).float())
    return bert("SequenceClassification", num_labels=3, problem_type="multi_label_classification"), data, {}


def answers() -> tuple[nn.Module, Any, dict[str, Any]]:
    data = [
        {**{k: v for k, v in x.items() if k != "labels"}, "start_positions": torch.tensor(0), "end_positions": x_end}
        for x in s.sentences()
        for x_end in [x["attention_mask"].sum() - 1]
    ]
    return bert("QuestionAnswering"), data, {}


def images() -> tuple[nn.Module, Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        **SMALL, image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.ViTForImageClassification(config), drawn((3, 8, 8), lambda i: torch.tensor(i % 3)), {}


def sounds() -> tuple[nn.Module, Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        **SMALL, max_length=16, num_mel_bins=16, patch_size=8, time_stride=8, frequency_stride=8, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    data = drawn((16, 16), lambda i: torch.tensor(i % 3), "input_values")
    return transformers.ASTForAudioClassification(config), data, {}


TASKS = [masked_words, translation, words_of_kinds, several_labels, answers, images, sounds]


def trained(folder: Path, model: nn.Module, data: Any, *, kind: Any = Noting, **others: Any) -> tuple[Any, Any]:
    """The callback and the trainer, after a training."""
    settings = {
        name: others.pop(name) for name in list(others) if name in Seq2SeqTrainingArguments.__dataclass_fields__
    }
    arguments: Any = s.arguments(folder, **settings)
    if issubclass(kind, Seq2SeqTrainer):
        known = Seq2SeqTrainingArguments.__dataclass_fields__
        arguments = Seq2SeqTrainingArguments(**{k: v for k, v in arguments.to_dict().items() if k in known})
    logged = LogixCallback("run", root=folder, verbose=False, **s.IDENTITY)
    callbacks = [*others.pop("before", []), logged, *others.pop("behind", [])]
    trainer = kind(model, arguments, train_dataset=data, callbacks=callbacks, **others)
    trainer.seen = []
    try:
        trainer.train()
    finally:
        logged.close()
    return logged, trainer


def own_rows(model: nn.Module, store: Any, seen: list[dict[str, Tensor]]) -> Tensor:
    """The gradient of each sample's own loss, summed over its tokens where it has a label for each."""
    model.eval()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], sample: dict[str, Tensor]) -> Tensor:
        outputs = functional_call(model, parameters, kwargs={name: value[None] for name, value in sample.items()})
        labels = sample.get("labels", torch.zeros(()))
        by_token = labels.ndim == 1 and not labels.is_floating_point()
        return (outputs["loss"] if isinstance(outputs, dict) else outputs[0]) * (
            labels.ne(-100).sum() if by_token else 1
        )

    return full_rows(model, store.modules, [grad(loss)(weights, sample) for sample in seen])


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_rows_of_a_task(tmp_path: Path, task: Any, accumulated: int) -> None:
    model, data, settings = task()
    logged, trainer = trained(tmp_path, model, data, gradient_accumulation_steps=accumulated, **settings)
    store = logged.run.store
    assert len(store) == len(trainer.seen) == 2 * s.SAMPLES
    found, own = store.gradients[:], own_rows(model, store, trainer.seen)
    trained_on = torch.tensor([bool(sample.get("labels", torch.ones(1)).ne(-100).any()) for sample in trainer.seen])
    assert s.relative_error(found[trained_on], own[trained_on]) <= FLOAT32
    assert bool((found[~trained_on] == 0).all())  # of a sample of which no word was masked


def test_choices_that_the_model_lays_side_by_side_are_refused(tmp_path: Path) -> None:
    data = [
        {name: torch.stack([x[name], y[name]]) for name in ("input_ids", "attention_mask")}
        | {"labels": torch.tensor(0)}
        for x, y in zip(s.sentences(), s.sentences()[::-1], strict=True)
    ]
    with pytest.raises(CaptureError, match=r"module 'bert\..* so 4 samples along dimension 0, but 2 data ids"):
        trained(tmp_path, bert("MultipleChoice"), data)


class EvalParts(Noting):
    """Puts part of the model, or all of it, in eval mode for each step."""

    whole = False

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        for part in model.modules() if self.whole else [model.bert, *model.bert.modules(), model.dropout]:
            part.training = False
        return super().compute_loss(model, *args, **kwargs)


class EvalAll(EvalParts):
    whole = True


def test_parts_in_eval_mode(tmp_path: Path) -> None:
    model = s.bert(dropout=0.5)
    logged, trainer = trained(tmp_path, model, s.labelled(), kind=EvalParts)
    store = logged.run.store
    assert s.relative_error(store.gradients[:], own_rows(model, store, trainer.seen)) <= FLOAT32


def test_a_whole_model_in_eval_mode_is_said(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="in eval mode is taken to be evaluated"):
        trained(tmp_path, s.bert(dropout=0.5), s.labelled(), kind=EvalAll)


class Tuples(Trainer):
    """Has the model return a tuple."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "return_dict": False}, *args, **kwargs)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("kind", ["language", "classes"])
def test_models_that_return_tuples(tmp_path: Path, kind: str, accumulated: int) -> None:
    model, data = (s.llama(), s.sentences()) if kind == "language" else (s.bert(), s.labelled())
    store = s.trained(tmp_path, model, data, kind=Tuples, gradient_accumulation_steps=accumulated).run.store
    assert len(store) == 22
    assert s.relative_error(store.gradients[:], s.own_rows(model, store, data)) <= FLOAT32


def test_a_frozen_encoder_is_not_tracked(tmp_path: Path) -> None:
    model, data = s.bert(), s.labelled()
    model.bert.encoder.requires_grad_(False)
    model.bert.embeddings.requires_grad_(False)
    store = s.trained(tmp_path, model, data).run.store
    assert list(store.modules.names) == ["bert.pooler.dense", "classifier"]
    assert s.relative_error(store.gradients[:], s.own_rows(model, store, data)) <= FLOAT32


class Stop(TrainerCallback):
    """Stops the training, behind a step or in the midst of one."""

    def __init__(self, midst: bool) -> None:
        self.midst = midst

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = control.should_training_stop = self.midst and state.global_step > 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = not self.midst


class Freeze(TrainerCallback):
    """Freezes a layer when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.model.layers[0].requires_grad_(False)


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize(("midst", "rows"), [(False, 4), (True, 6)])
def test_another_callback_stops_the_training(tmp_path: Path, place: str, midst: bool, rows: int) -> None:
    model, data = s.llama(), s.sentences()
    others = {place: [Stop(midst)]}
    store = trained(tmp_path, model, data, gradient_accumulation_steps=2, **others)[0].run.store
    assert len(store) == rows
    assert s.relative_error(store.gradients[:], s.own_rows(model, store, data)) <= FLOAT32


@pytest.mark.parametrize("place", ["before", "behind"])
def test_another_callback_freezes_a_layer(tmp_path: Path, place: str) -> None:
    model, data = s.llama(), s.sentences()
    store = trained(tmp_path, model, data, **{place: [Freeze()]})[0].run.store
    assert len(store.modules) == (8 if place == "before" else 15)
    model.requires_grad_(True)  # rows of a layer that is frozen later are what its gradients would be
    assert s.relative_error(store.gradients[:], s.own_rows(model, store, data)) <= FLOAT32


class Predict(TrainerCallback):
    """Has the trainer evaluate and predict between steps."""

    trainer: Any

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.predict(s.sentences(3))
        self.trainer.evaluate()


def test_evaluation_and_prediction_around_the_training_and_in_it(tmp_path: Path) -> None:
    model, data, predict = s.llama(), s.sentences(), Predict()
    several = {"a": s.sentences(4), "b": s.sentences(3)}
    logged = LogixCallback("run", root=tmp_path, verbose=False, **s.IDENTITY)
    arguments = s.arguments(tmp_path, eval_strategy="epoch")
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=several, callbacks=[logged, predict])
    predict.trainer = trainer
    trainer.evaluate()
    trainer.train()
    trainer.predict(s.sentences(3))
    store = logged.run.store
    assert len(store) == 22
    assert s.relative_error(store.gradients[:], s.own_rows(model, store, data)) <= FLOAT32


class Sized(IterableDataset[Any]):
    """A stream that knows its length."""

    def __len__(self) -> int:
        return s.SAMPLES

    def __iter__(self) -> Any:
        return iter(s.sentences())


def table() -> datasets.Dataset:
    data = s.sentences()
    return datasets.Dataset.from_dict({name: [sample[name].tolist() for sample in data] for name in data[0]})


DATASETS: dict[str, Callable[[], tuple[Any, list[int] | None]]] = {
    "a table": lambda: (table(), None),
    "a table of tensors": lambda: (table().with_format("torch"), None),
    "a table of arrays": lambda: (table().with_format("numpy"), None),
    "part of a table": lambda: (table().select([4, 2, 9]), [4, 2, 9]),
    "parts of a list": lambda: (
        ConcatDataset([Subset(s.sentences(), [5, 6, 7]), Subset(s.sentences(), [0, 1])]), [5, 6, 7, 0, 1]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DATASETS)
def test_samples_are_called_by_their_index_in_the_dataset_that_is_given(tmp_path: Path, kind: str) -> None:
    dataset, order = DATASETS[kind]()
    model, data = s.llama(), s.sentences()
    store = s.trained(tmp_path, model, dataset).run.store
    data = data if order is None else [data[i] for i in order]
    assert sorted(store.data_id) == sorted([*range(len(data))] * 2)
    assert s.relative_error(store.gradients[:], s.own_rows(model, store, data)) <= FLOAT32


@pytest.mark.parametrize("kind", ["with a length", "shuffled"])
def test_samples_of_other_streams(tmp_path: Path, kind: str) -> None:
    stream = Sized() if kind == "with a length" else table().to_iterable_dataset(num_shards=2).shuffle(buffer_size=4)
    model = s.llama()
    logged, trainer = trained(tmp_path, model, stream, max_steps=5)
    store = logged.run.store
    assert len(store) == len(trainer.seen) == 10
    assert len(set(store.data_id)) == 10
    assert s.relative_error(store.gradients[:], own_rows_of_language(model, store, trainer.seen)) <= FLOAT32


def own_rows_of_language(model: nn.Module, store: Any, seen: list[dict[str, Tensor]]) -> Tensor:
    names = dict(zip(store.data_id, seen, strict=True))
    return s.own_rows(model, store, names)


def packed(samples: list[s.Sample]) -> s.Sample:
    """All samples of a batch one behind the other, as collators without padding lay them."""
    return {name: torch.cat([sample[name] for sample in samples])[None] for name in ("input_ids", "labels")}


def test_samples_that_are_packed_are_named_as_a_whole_or_refused(tmp_path: Path) -> None:
    collator = {"data_collator": packed}
    with pytest.raises(CaptureError, match=r"read 2 samples, and its collator made 'input_ids' of shape \(1, 12\)"):
        s.trained(tmp_path / "by index", s.llama(), s.sentences(), trainer=collator)
    store = s.trained(
        tmp_path, s.llama(), s.sentences(), trainer=collator, num_train_epochs=1,
        callback={"data_id": lambda batch: batch["input_ids"]},
    ).run.store  # fmt: skip
    assert len(set(store.data_id)) == len(store) == 6
