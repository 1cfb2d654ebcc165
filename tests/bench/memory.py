"""One run over W1 in a process of its own, printing its memory: ``python -m tests.bench.memory [logged] ROOT``."""

from __future__ import annotations

import json
import resource
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

import logix_like as logix
from tests.bench import w1

MARKS = (0.25, 1.0)
"""Shares of the run at which the resident memory is read: growth between them is the samples'."""


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def main(kind: str, root: str) -> None:
    torch.set_num_threads(2)
    network, batches = w1.model(), w1.batches()
    run = logix.init("memory", network, w1.CONFIG, root=root, verbose=False) if kind == "logged" else None
    marks = [int(share * len(batches)) - 1 for share in MARKS]
    seen = []
    for number, tokens in enumerate(batches):
        network.zero_grad()
        with nullcontext() if run is None else run(data_id=range(number * w1.BATCH, (number + 1) * w1.BATCH)):
            w1.loss(network, tokens).backward()
        if number in marks:
            seen.append(resident())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if run is not None:
        run.finalize()
    samples = (marks[1] - marks[0]) * w1.BATCH
    print(json.dumps({"peak": peak, "growth": (seen[1] - seen[0]) / samples}))


if __name__ == "__main__":
    main(*sys.argv[1:])
