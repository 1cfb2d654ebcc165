"""Models that carry hooks of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from tests.training import batches, data, full, network, own_gradients

EXACT = 1e-9


def doubled(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """As layers are steered, or their outputs rounded."""
    return 2 * output.clamp(-1, 1)


def shifted(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 1,)


def require_own_rows(model: nn.Module, folder: Path) -> None:
    """Each row of a logged training is the gradient of its sample alone."""
    x, y = data()
    expected = own_gradients(model, x, y)
    run = logix.init("run", model, full(folder), verbose=False)
    for index in batches():
        with run(data_id=index):
            F.cross_entropy(model(x[index]), y[index]).backward()
    run.finalize()
    rows = run.store.gradients[:]
    assert float((rows - expected).norm() / expected.norm()) < EXACT


@pytest.mark.parametrize("kind", ["forward", "before it"])
def test_hooks_that_change_what_goes_in_or_comes_out(tmp_path: Path, kind: str) -> None:
    model = network()
    for layer in (model[0], model[2]):
        if kind == "forward":
            layer.register_forward_hook(doubled)
        else:
            layer.register_forward_pre_hook(shifted)
    require_own_rows(model, tmp_path)


def test_a_call_on_the_side_that_no_gradient_comes_back_to(tmp_path: Path) -> None:
    """A module's own weight is read by calling it, as adapters do that keep their norms."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            weight = self.net[0](torch.eye(x.shape[1], dtype=x.dtype)).detach()
            out: Tensor = self.net(x) / weight.norm()
            return out

    require_own_rows(Normed(), tmp_path)
