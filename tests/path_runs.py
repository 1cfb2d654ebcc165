"""Trainings that the tests of path estimators record, each a few steps on a few samples in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from logix_like.layout import DataId
from logix_like.objective import Objective
from logix_like.path import TrainingPath

SAMPLES, FEATURES, CLASSES, BATCH = 24, 5, 3, 6
QUERIES = 4
OBJECTIVE = Objective()


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def training_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    return x, (x @ torch.randn(FEATURES, CLASSES, generator=generator, dtype=torch.float64)).argmax(1)


def queries() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(QUERIES, FEATURES, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 1])


def batch_of(ids: Sequence[DataId]) -> tuple[Tensor, Tensor]:
    x, y = training_data()
    return x[list(ids)], y[list(ids)]


def query_losses(model: nn.Module) -> Tensor:
    x, y = queries()
    return F.cross_entropy(model(x), y, reduction="none").detach()


def train(
    root: Path,
    optimizer: str = "SGD",
    *,
    steps: int = 12,
    checkpoints: Any = "none",
    batch: int = BATCH,
    head_lr: float | None = None,
    **hyper: Any,
) -> tuple[TrainingPath, nn.Sequential]:
    """Record a training over the samples in order; returns its path and the trained model.

    With ``head_lr`` the last layer makes a parameter group of its own.
    """
    model = network()
    groups: Any = model.parameters()
    if head_lr is not None:
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": head_lr}]
    taker = getattr(torch.optim, optimizer)(groups, **{"lr": 0.15, **hyper})
    config = {"root": str(root), "record": "path", "checkpoints": checkpoints, "projection": {"init": "identity"}}
    run = logix.init("run", model, {**config, "store": {"dtype": "float64"}}, optimizer=taker, verbose=False)
    for step in range(steps):
        ids = [(batch * step + j) % SAMPLES for j in range(batch)]
        x, y = batch_of(ids)
        taker.zero_grad()
        with run(data_id=ids):
            F.cross_entropy(model(x), y).backward()
        taker.step()
    run.finalize()
    return run.training_path, model
