"""Small training runs that the tests of a whole run share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix

SAMPLES, FEATURES, CLASSES = 23, 6, 3
"""23 samples in batches of 5: the last batch is an odd one."""


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return x, (x[:, :CLASSES]).argmax(1)


def batches(size: int = 5) -> Iterator[Tensor]:
    """Indices of each batch."""
    yield from torch.arange(SAMPLES).split(size)


def linear_gradient(module: nn.Linear) -> Tensor:
    """``[d_out, d_in + 1]``: the gradient that a backward pass left, the bias's as the last column."""
    assert module.weight.grad is not None
    assert module.bias.grad is not None
    return torch.cat([module.weight.grad, module.bias.grad[:, None]], 1)


def own_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Every sample's own gradient by a batch of one, ``[samples, width]`` with a bias as a module's last column."""
    rows = []
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        parts = [linear_gradient(m).flatten() for m in model.modules() if isinstance(m, nn.Linear)]
        rows.append(torch.cat(parts))
    model.zero_grad()
    return torch.stack(rows)


def full(root: Path, **changes: Any) -> dict[str, Any]:
    """A config that stores un-projected gradients in full precision."""
    return {
        "root": str(root),
        "projection": {"init": "identity"},
        "store": {"dtype": "float64"},
        **changes,
    }


def trained_run(root: Path, model: nn.Module, epochs: int = 1, lr: float = 0.1, **config: Any) -> logix.Run:
    """A finalized run over the data, each epoch in the same order; ids are ``s0``, ``s1``, ..."""
    x, y = data(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    settings = {"root": str(root), **config}
    run = logix.init("run", model, settings, optimizer=optimizer, verbose=False)
    for epoch in range(epochs):
        run.epoch(epoch)
        for index in batches():
            with run(data_id=[f"s{i}" for i in index]):
                F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    run.finalize()
    return run
