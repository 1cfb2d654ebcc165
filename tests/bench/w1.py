"""Workload W1: a four-layer LLaMA with random tokens, and a clock that compares two steps fairly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH, LENGTH, SEQUENCES, VOCABULARY = 8, 128, 512, 8192
CONFIG = {
    "modules": {"include": ["model.layers.*"], "types": ["Linear"]},
    "projection": {"rank": 16},
    "statistics": ["covariance"],
}


def model() -> nn.Module:
    """W1's model, seed 0, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
            tie_word_embeddings=False,
        )
    )


def batches() -> list[Tensor]:
    """W1's 512 sequences in batches of 8."""
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator).split(BATCH))


def loss(network: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss."""
    return network(input_ids=tokens, labels=tokens, use_cache=False).loss


@dataclass(frozen=True)
class Ratio:
    """How long one thing takes compared with another."""

    name: str
    ours: float
    """Median seconds."""
    other: float
    quartiles: tuple[float, float, float]
    """Of the ratios, pair by pair."""

    def __str__(self) -> str:
        low, middle, high = self.quartiles
        return (
            f"{self.name:<58} ours {self.ours * 1e3:9.2f} ms  other {self.other * 1e3:9.2f} ms  "
            f"ratio {middle:.3f} [{low:.3f}, {high:.3f}]"
        )


def compare(
    name: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    *,
    pairs: int = 24,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Time two things in turn, changing who goes first, in one process."""
    first: list[float] = []
    second: list[float] = []
    for number in range(warmup + pairs):
        order = ((ours, first), (other, second)) if number % 2 else ((other, second), (ours, first))
        for act, times in order:
            start = clock()
            act()
            if number >= warmup:
                times.append(clock() - start)
    return ratio_of(name, first, second)


def ratio_of(name: str, ours: list[float], other: list[float]) -> Ratio:
    """What two series of times, taken in turn, say."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, other, strict=True)], n=4)
    return Ratio(name, statistics.median(ours), statistics.median(other), (low, middle, high))


def forever(items: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The items again and again, numbered."""
    number = 0
    while True:
        yield number, items[number % len(items)]
        number += 1
