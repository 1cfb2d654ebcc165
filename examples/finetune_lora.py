"""Fine-tune a causal language model with LoRA adapters, and ask which verses lowered the loss of another.

Only the adapters are trained, so only they are logged; the frozen model costs nothing. Run it with
``python examples/finetune_lora.py [folder]``.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from logix_like.examples.verses import Verses, load_verses
from logix_like.integrations.huggingface import LogixCallback
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import logix_like as logix


@dataclass(frozen=True)
class Settings:
    """Size of the example; tests make it smaller."""

    verses: int = 1500
    epochs: int = 2
    width: int = 64
    rank: int = 4


def adapted(words: int, settings: Settings) -> nn.Module:
    """A small LLaMA; bring a pretrained one for real use."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SystemExit("this example needs peft: pip install peft") from error
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=settings.width, intermediate_size=2 * settings.width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model: nn.Module = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=settings.rank, target_modules=targets))
    return model


def train(model: nn.Module, verses: Verses, settings: Settings, folder: Path) -> logix.Run:
    """The Trainer accumulates and averages over tokens; the rows are each verse's own all the same."""
    labels = verses.tokens.masked_fill(~verses.mask, -100)
    data = [
        {"input_ids": verses.tokens[i], "attention_mask": verses.mask[i].long(), "labels": labels[i]}
        for i in range(settings.verses)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), num_train_epochs=settings.epochs, per_device_train_batch_size=8,
        gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], save_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip
    callback = LogixCallback("lora", root=folder, overwrite=True, projection={"rank": 8})
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    run: logix.Run = callback.run
    return run


def main(folder: Path, settings: Settings | None = None) -> logix.InfluenceResult:
    """Train, then ask about the first verse."""
    settings = settings or Settings()
    verses = load_verses(settings.verses)
    model = adapted(verses.words, settings)
    run = train(model, verses, settings, folder)
    model.eval()
    device = next(model.parameters()).device
    tokens, mask = verses.tokens[:1].to(device), verses.mask[:1].to(device)
    with run.query(data_id=[verses.texts[0]]) as query:
        model(input_ids=tokens, attention_mask=mask.long(), labels=tokens.masked_fill(~mask, -100)).loss.backward()
    # cosine: rows are sums over a verse's words, and a long verse shall not count for more than a short one
    result = run.compute_influence_all(query, k=5, mode="cosine")
    ranking = result.proponents()
    print(f"\nWhat most lowered the loss of {verses.texts[0]!r}:")
    for number, score in zip(ranking.ids[0], ranking.scores[0], strict=True):
        print(f"  {float(score):+.3f}  {verses.texts[number]}")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
