"""One run over W1 in a process of its own, printing its memory: ``python -m tests.bench.memory [logged] ROOT``."""

from __future__ import annotations

import json
import resource
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

import logix_like as logix
from tests.bench import w1

PASSES = 2
"""Passes over the sequences: buffers are filled in the first, growth is what the second adds."""


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def main(kind: str, root: str) -> None:
    torch.set_num_threads(2)
    network, batches = w1.model(), w1.batches()
    run = logix.init("memory", network, w1.CONFIG, root=root, verbose=False) if kind == "logged" else None
    seen: list[int] = []
    for number, tokens in enumerate(batches * PASSES, 1):
        network.zero_grad()
        with nullcontext() if run is None else run(data_id=range((number - 1) * w1.BATCH, number * w1.BATCH)):
            w1.loss(network, tokens).backward()
        seen.append(resident())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if run is not None:
        run.finalize()
    # What is resident goes up and down within a step: medians over the last half of each pass are compared.
    halves = [statistics.median(seen[end - len(batches) // 2 : end]) for end in (len(batches), len(seen))]
    print(json.dumps({"peak": peak, "growth": (halves[1] - halves[0]) / w1.SEQUENCES}))


if __name__ == "__main__":
    main(*sys.argv[1:])
