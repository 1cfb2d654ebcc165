"""trl's SFTTrainer, a subclass of the Hugging Face Trainer, takes the same callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import datasets
import torch
from logix_like.integrations.huggingface import LogixCallback
from logix_like.integrations.logits import token_factor
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from logix_like.errors import CaptureError
from tests.integrations import sentences as s
from tests.models import VOCABULARY

FLOAT32 = 2e-5
PAD = {"pad_token_id": 0}

pytestmark = pytest.mark.filterwarnings("ignore::Warning:trl.*", "ignore::DeprecationWarning")


def tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w0``, ``w1``, ...; data are tokenized already, the trainer only asks for one."""
    words = WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w1")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w0", eos_token="w1")


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """trl reports its use to its makers, in a thread of its own, unless told not to."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_rows_of_supervised_fine_tuning(tmp_path: Path, accumulated: int) -> None:
    data = s.sentences()
    tokens = [sample["input_ids"][sample["attention_mask"].bool()].tolist() for sample in data]
    arguments: dict[str, Any] = {
        **s.arguments(tmp_path, gradient_accumulation_steps=accumulated).to_dict(),
        "max_length": None, "packing": False, "eos_token": None,
    }  # fmt: skip
    known = SFTConfig.__dataclass_fields__
    config = SFTConfig(**{name: value for name, value in arguments.items() if name in known})
    # The head is fused into the loss: its weight is used without calling the module.
    modules = {"exclude": ["*lm_head"]}
    callback = LogixCallback("run", root=tmp_path, verbose=False, modules=modules, **s.IDENTITY)
    network = s.llama()
    trainer = SFTTrainer(
        network, args=config, train_dataset=datasets.Dataset.from_dict({"input_ids": tokens}), callbacks=[callback],
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    store = callback.run.store
    assert len(store) == 2 * s.SAMPLES
    assert s.relative_error(store.gradients[:], s.own_rows(network, store, data)) <= FLOAT32


def test_the_factor_of_a_loss_of_token_probabilities_is_found() -> None:
    log_chances = torch.randn(3, 5, dtype=torch.float64).sub(3).requires_grad_()
    counted = torch.rand(3, 5) < 0.7
    losses = {
        "nll": -log_chances * counted,
        "dft": -log_chances * log_chances.exp().detach() * counted,
        "squared": log_chances.square() * counted,
    }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(0.013 * loss.sum(), log_chances)
        if name == "squared":
            with pytest.raises(CaptureError, match="weights its tokens unequally"):
                token_factor(log_chances, gradient)
        else:
            assert token_factor(log_chances, gradient) == pytest.approx(0.013, rel=1e-9)


@pytest.mark.parametrize("kind", ["DPO", "reward"])
def test_losses_of_pairs_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    words = [{"prompt": "w3 w4", "chosen": f" w{5 + i} w3", "rejected": f" w4 w{5 + i}"} for i in range(4)]
    callback = LogixCallback("run", root=tmp_path, verbose=False, modules={"exclude": ["*lm_head"]}, **s.IDENTITY)
    common: dict[str, Any] = {"processing_class": tokenizer(), "callbacks": [callback]}
    settings, trainer_of = (DPOConfig, DPOTrainer) if kind == "DPO" else (RewardConfig, RewardTrainer)
    known = settings.__dataclass_fields__
    given = {**s.arguments(tmp_path).to_dict(), "max_length": 6, "eos_token": None, "pad_token": None}
    args = settings(**{name: value for name, value in given.items() if name in known})
    if kind == "DPO":
        network, common["ref_model"] = s.llama(), s.llama()
    else:
        network = LlamaForSequenceClassification(LlamaConfig(**{**s.llama().config.to_dict(), "num_labels": 1, **PAD}))
        words = [{name: sample[name] for name in ("chosen", "rejected")} for sample in words]
    trainer = trainer_of(network, args=args, train_dataset=datasets.Dataset.from_list(words), **common)
    with pytest.raises(CaptureError, match=r"read 2 samples, and its collator made 'input_ids' of shape \(4, "):
        trainer.train()
    callback.close()
