"""Train a small language model on the Gospels with three lines of logging; ask which verses taught it a sentence.

``python examples/language_model.py`` takes a minute or two; ``--query TEXT`` asks about another sentence, ``--text
FILE`` trains on the paragraphs of a file of your own.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from logix_like.examples.measuring import compare_steps
from logix_like.examples.text import PADDING, Batch, Words, batch_of, endless, gospels, paragraphs, shuffled
from torch import Tensor, nn

import logix_like as logix

QUERY = "Ask, and you will receive; search, and you will find; knock, and the door will be opened to you."
"""Matthew 7:7 and Luke 11:9 in other words."""


@dataclass(frozen=True)
class Settings:
    """Size of the model and of its training."""

    width: int = 128
    heads: int = 4
    layers: int = 2
    vocabulary: int = 4000
    length: int = 64
    passages: int | None = None
    epochs: int = 3
    batch: int = 32
    measured_steps: int = 30


QUICK = Settings(width=64, vocabulary=1500, passages=400, measured_steps=10)
"""For a first look, and for tests."""


class Layer(nn.Module):
    """Attention to earlier words, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query_key_value, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, positions, width]`` to the same shape."""
        parts = self.query_key_value(self.norms[0](x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return x


class LanguageModel(nn.Module):
    """A small transformer that says how probable each next word is."""

    def __init__(self, vocabulary: int, settings: Settings) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, settings.width)
        self.places = nn.Embedding(settings.length, settings.width)
        self.layers = nn.Sequential(*(Layer(settings.width, settings.heads) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width)
        self.lm_head = nn.Linear(settings.width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[batch, positions]`` to logits ``[batch, positions, vocabulary]``."""
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        logits: Tensor = self.lm_head(self.norm(self.layers(x)))
        return logits


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss over all words of a batch: the preset ``language_model`` expects this."""
    logits = model(batch.inputs)
    return F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=PADDING)


def train(model: nn.Module, passages: Mapping[str, Tensor], settings: Settings, root: Path) -> logix.Run:
    """An ordinary loop, with three lines that log it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run = logix.init(  # line 1: the preset leaves out the head, which is as wide as the vocabulary
        "language_model",
        model,
        config="language_model",
        optimizer=optimizer,
        root=root,
        checkpoints="every_epoch",
    )
    for epoch in range(settings.epochs):
        run.epoch(epoch)
        losses = []
        for batch in shuffled(passages, settings.batch):
            with run(data_id=batch.ids, mask=batch.mask):  # line 2: around forward and backward
                loss = loss_of(model, batch)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"  epoch {epoch}: mean loss {sum(losses) / len(losses):.2f}", flush=True)
    run.finalize()  # line 3: everything is on disk
    return run


def ask(run: logix.Run, question: Batch, texts: Mapping[str, str], k: int = 5) -> None:
    """Print the passages that taught the model a sentence, and those that taught it otherwise.

    The sentence's gradient is averaged over the checkpoints; ``cosine`` keeps long passages, whose gradients are
    large, from coming first whatever is asked.
    """
    query = run.query_fn(question, loss_of, data_id=question.ids, mask=question.mask, checkpoints="all")
    result = run.compute_influence_all(query, k=k, mode="cosine")
    print(f"\nWhich passages taught the model this? {question.ids[0]}\n  ({result.note})")
    for name, ranking in (
        ("Proponents (above 0: training on them lowered the sentence's loss)", result.proponents()),
        ("Opponents (below 0: training on them raised it)", result.opponents()),
    ):
        print(name)
        for data_id, score in zip(ranking.ids[0], ranking.scores[0].tolist(), strict=True):
            print(f"  {score:+.3f}  {data_id:<14} {texts[data_id]}")


def step_of(model: nn.Module, run: logix.Run | None) -> Callable[[Batch], None]:
    """One training step, logged if there is a run."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def step(batch: Batch) -> None:
        with nullcontext() if run is None else run(data_id=batch.ids, mask=batch.mask):
            loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_overhead(model: nn.Module, passages: Mapping[str, Tensor], settings: Settings, root: Path) -> None:
    """Time plain and logged steps of two copies of the model, in turn."""
    plain, logged = copy.deepcopy(model), copy.deepcopy(model)
    batches = islice(endless(passages, settings.batch), settings.measured_steps)
    with logix.init("measured", logged, "language_model", root=root, verbose=False) as run:
        overhead = compare_steps(step_of(plain, None), step_of(logged, run), batches)
    print(f"Overhead: {overhead}.")


def report(store: logix.GradientStore) -> None:
    """What was logged."""
    sizes = store.bytes
    print(f"\nLogged: {len(store):,} rows, one for each passage and epoch, of {store.modules.width:,} numbers from")
    print(f"  {len(store.modules)} modules, and {len(store.checkpoints)} checkpoints; in {store.path}")
    print(f"  {sum(sizes.values()) / 1e6:.1f} MB: " + ", ".join(f"{n} {s / 1e6:.1f}" for n, s in sizes.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, ask, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--query", default=QUERY, help="the sentence to ask about")
    parser.add_argument("--text", type=Path, help="train on the paragraphs of this file (between blank lines)")
    parser.add_argument("--root", type=Path, help="folder to keep the store in (default: a temporary one, removed)")
    parser.add_argument("--quick", action="store_true", help="a smaller model on fewer passages")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else Settings()
    torch.set_num_threads(1)  # steps this small gain little by a second thread, and lose much on a busy machine
    torch.manual_seed(0)
    texts = paragraphs(options.text) if options.text else gospels()
    if not texts:
        parser.error(f"{options.text} holds no paragraph")
    texts = dict(islice(texts.items(), settings.passages))
    words = Words(list(texts.values()), settings.vocabulary)
    passages = {name: words.encode(text, settings.length) for name, text in texts.items()}
    model = LanguageModel(words.size, settings)
    print(f"Training on {len(passages):,} passages, {sum(map(len, passages.values())):,} words.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        start = time.perf_counter()
        run = train(model, passages, settings, options.root or Path(scratch))
        print(f"Trained and logged in {time.perf_counter() - start:.0f} s.")
        ask(run, batch_of([options.query], {options.query: words.encode(options.query, settings.length)}), texts)
        report(run.store)
        measure_overhead(model, passages, settings, Path(scratch))


if __name__ == "__main__":
    try:
        main()
    except (logix.LogixError, OSError) as error:
        sys.exit(f"error: {error}")
