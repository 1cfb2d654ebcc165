"""Real gradients: those of a small byte-level language model, trained on the Gospels, for pieces of the same text."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from logix_like.examples.text import gospels
from torch import Tensor, nn

import logix_like as logix
from logix_like.query.gradients import QueryGradients
from tests.bench import w1

LENGTH, BATCH, STEPS = 48, 64, 300
CACHE = Path(tempfile.gettempdir()) / "logix-bench-cache"
"""Stores of real gradients are made once."""


def model() -> nn.Module:
    """Two layers of 64 numbers, 14 linear modules: rows of 3,584 numbers at rank 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=256,
            tie_word_embeddings=False,
        )
    )


def pieces(count: int) -> Tensor:
    """``[count, LENGTH]`` bytes of the text, evenly spread."""
    text = " ".join(gospels().values()).encode()
    starts = torch.linspace(0, len(text) - LENGTH - 1, count).long().tolist()
    return torch.stack([torch.frombuffer(bytearray(text[s : s + LENGTH]), dtype=torch.uint8) for s in starts]).long()


def trained(rows: int) -> tuple[nn.Module, Tensor]:
    """The model after training on ``rows`` pieces, and these."""
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    known = pieces(rows)
    for _ in range(STEPS):
        optimizer.zero_grad()
        w1.loss(network, known[torch.randint(rows, (BATCH,))]).backward()
        optimizer.step()
    return network, known


def make(rows: int, asked: int) -> tuple[logix.Run, QueryGradients]:
    """A run with the gradients of ``rows`` pieces by the trained model, and those of ``asked`` pieces from between."""
    folder = CACHE / f"trained-{rows}-{asked}"
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        _make(unfinished, rows, asked)
        unfinished.rename(folder)
    return logix.load(folder / "trained", model=model()), QueryGradients.load(folder / "queries.npz")


def _make(folder: Path, rows: int, asked: int) -> None:
    """Train, then log ``rows`` pieces with the finished model; queries are further pieces, from between them."""
    network, known = trained(rows)
    run = logix.init("trained", network, w1.CONFIG, root=str(folder), verbose=False)
    run.extract(known.split(BATCH), w1.loss, progress=False)
    run.finalize()
    with run.query(data_id=range(asked)) as query:
        w1.loss(network, pieces(asked + 2)[1:-1]).backward()
    query.gradients.save(folder / "queries.npz")
