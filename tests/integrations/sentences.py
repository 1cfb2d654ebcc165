"""Tiny language models and data that the tests of trainers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from logix_like.integrations.huggingface import LogixCallback
from torch import Tensor, nn
from torch.func import functional_call, grad
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import logix_like as logix
from tests.models import LENGTH, VOCABULARY
from tests.reference_capture import full_rows

SAMPLES = 11
"""In micro-batches of 2 the last one is odd, and with accumulation the last step is short."""
IDENTITY: dict[str, Any] = {"projection": {"init": "identity"}, "store": {"dtype": "float64"}}
Sample = dict[str, Tensor]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, attn_implementation="eager", bos_token_id=0,
        eos_token_id=0, pad_token_id=None, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=VOCABULARY, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, attn_implementation="eager", bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bert(labels: int = 3, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        attn_implementation="eager", num_labels=labels,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def sentences(samples: int = SAMPLES) -> list[Sample]:
    """Padded sequences of 3 to 6 tokens, to be predicted token by token."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for _ in range(samples):
        length = int(torch.randint(3, LENGTH + 1, (1,), generator=generator))
        mask = torch.arange(LENGTH) < length
        tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator) * mask
        labels = torch.where(mask, tokens, -100)
        data.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": labels})
    return data


def labelled(samples: int = SAMPLES, classes: int = 3) -> list[Sample]:
    """The same sequences, each with one label; with one class, a number."""
    return [
        {**sample, "labels": torch.tensor(i % classes) if classes > 1 else torch.tensor(i / 7)}
        for i, sample in enumerate(sentences(samples))
    ]


def own_rows(
    model: nn.Module,
    store: logix.GradientStore,
    data: Sequence[Sample] | Mapping[Any, Sample],
    smoothing: float = 0.0,
) -> Tensor:
    """By ``torch.func``: each stored row's sample's own gradient at the model's present weights.

    The loss is the sum over the sample's predicted tokens, or its one label's; with ``smoothing`` the cross-entropy
    with smoothed labels.
    """
    model.eval()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], sample: Sample) -> Tensor:
        batch = {name: value[None] for name, value in sample.items()}
        labels = sample["labels"]
        counted = labels[1:].ne(-100).sum() if labels.ndim else 1
        outputs = functional_call(model, parameters, kwargs=batch)
        if not smoothing:
            return outputs.loss * counted
        logits = outputs.logits[0, :-1] if labels.ndim else outputs.logits
        targets = labels[1:] if labels.ndim else labels[None]
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)

    gradients = [grad(loss)(trained, data[i]) for i in store.data_id]
    return full_rows(model, store.modules, gradients)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Two epochs in micro-batches of 2, without anything that is not asked for; weights stay as they are."""
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(settings | changes))


def trained(
    folder: Path,
    model: nn.Module,
    data: Any,
    *,
    kind: type[Trainer] = Trainer,
    callback: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **changes: Any,
) -> LogixCallback:
    """The callback of a finished training."""
    logged = LogixCallback("run", root=folder, verbose=False, **{**IDENTITY, **(callback or {})})
    kind(model, arguments(folder, **changes), train_dataset=data, callbacks=[logged], **(trainer or {})).train()
    return logged


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest relative error of a row."""
    error = (found.double() - expected.double()).norm(dim=1)
    return float((error / expected.double().norm(dim=1)).max())
