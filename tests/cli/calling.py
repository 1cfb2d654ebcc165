"""Calling the command, and reading how it refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from typer.testing import CliRunner, Result

import logix_like as logix
from logix_like.cli import app
from tests.training import CLASSES, FEATURES, batches, data, network

EPOCHS = 2
WIDTH = 8 * (FEATURES + 1) + CLASSES * 9


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def refused(result: Result) -> str:
    """The one line that an error is."""
    assert result.exit_code == 1
    assert result.stdout == ""
    line, end = result.stderr.split("\n")
    assert end == ""
    assert line.startswith("error: ")
    return line


def usage_error(result: Result) -> str:
    assert result.exit_code == 2
    return " ".join(result.stderr.replace("│", " ").split())


def logged(root: Path, names: Sequence[str | int]) -> logix.Run:
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = logix.init("cli", model, optimizer=optimizer, root=root, checkpoints="every_epoch", verbose=False)
    x, y = data(torch.float32)
    for epoch in range(EPOCHS):
        run.epoch(epoch)
        for ids in batches():
            with run(data_id=[names[i] for i in ids.tolist()]):
                F.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
    run.finalize()
    with run.query(data_id=["first", 2]):
        F.cross_entropy(model(x[:2]), y[:2]).backward()
    return run
