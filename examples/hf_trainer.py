"""Fine-tune a small encoder with the Hugging Face Trainer, and ask which sentences drove its predictions.

The model learns to tell verses of the Old Testament from those of the New. One callback logs the training. Run it
with ``python examples/hf_trainer.py [folder]``; the store is kept in the folder.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from logix_like.examples.verses import Verses, load_verses
from logix_like.integrations.huggingface import LogixCallback
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import logix_like as logix


@dataclass(frozen=True)
class Settings:
    """Size of the example; tests make it smaller."""

    verses: int = 3000
    tested: int = 300
    epochs: int = 3
    width: int = 64
    asked: int = 3


def encoder(words: int, width: int) -> nn.Module:
    """A two-layer BERT with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width,
        max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    model: nn.Module = BertForSequenceClassification(config)
    return model


def samples(verses: Verses, numbers: range) -> list[dict[str, Any]]:
    """What the Trainer reads."""
    return [
        {"input_ids": verses.tokens[i], "attention_mask": verses.mask[i].long(), "labels": verses.new[i]}
        for i in numbers
    ]


def train(model: nn.Module, data: list[dict[str, Any]], settings: Settings, folder: Path) -> logix.Run:
    """An ordinary Trainer with one callback more."""
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), num_train_epochs=settings.epochs, per_device_train_batch_size=16,
        learning_rate=1e-3, report_to=[], save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    callback = LogixCallback("verses", root=folder, overwrite=True)
    trainer.add_callback(callback)
    trainer.train()
    run: logix.Run = callback.run
    return run


def explain(run: logix.Run, model: nn.Module, verses: Verses, tested: range, asked: int) -> float:
    """Print what drove some predictions; returns the accuracy."""
    model.eval()
    device = next(model.parameters()).device
    batch = {"input_ids": verses.tokens[tested.start :], "attention_mask": verses.mask[tested.start :].long()}
    batch = {name: value.to(device) for name, value in batch.items()}
    with torch.no_grad():
        answers = model(**batch).logits.argmax(1)
    few = {name: value[:asked] for name, value in batch.items()}
    with run.query(data_id=[f"test {i}" for i in range(asked)]) as query:
        model(**few, labels=answers[:asked]).loss.backward()
    result = run.compute_influence_all(query, k=2)
    helped, harmed = result.proponents(), result.opponents()
    for i in range(asked):
        kind = ("Old", "New")[int(answers[i])]
        print(f"\n{verses.texts[tested.start + i]!r} was taken for {kind} Testament.")
        for word, ranking in (("helped", helped), ("harmed", harmed)):
            for number, score in zip(ranking.ids[i], ranking.scores[i], strict=True):
                testament = ("Old", "New")[int(verses.new[number])]
                print(f"  {word} {float(score):+9.3g}  {testament}  {verses.texts[number]}")
    return float((answers.cpu() == verses.new[tested.start :]).float().mean())


def main(folder: Path, settings: Settings | None = None) -> float:
    """Train, ask, and return the accuracy on verses that were not trained on."""
    settings = settings or Settings()
    verses = load_verses(settings.verses + settings.tested)
    order = torch.randperm(len(verses.texts), generator=torch.Generator().manual_seed(0))
    verses = verses.reordered(order)
    model = encoder(verses.words, settings.width)
    run = train(model, samples(verses, range(settings.verses)), settings, folder)
    tested = range(settings.verses, settings.verses + settings.tested)
    accuracy = explain(run, model, verses, tested, settings.asked)
    print(f"\naccuracy on {settings.tested} other verses: {accuracy:.2f}; {len(run.store)} rows in {run.path}")
    return accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
