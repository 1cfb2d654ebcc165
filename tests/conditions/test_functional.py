"""Calls by torch.func: stateless calls are captured, its transforms are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

import logix_like as logix
from logix_like.errors import CaptureError
from tests.training import SAMPLES, data, full, network, own_gradients


def test_a_functional_call_is_captured_at_the_weights_it_is_given(tmp_path: Path) -> None:
    (x, y), model, other = data(), network(), network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    weights = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    run = logix.init("run", model, full(tmp_path), verbose=False)
    with run(data_id=range(SAMPLES)):
        F.cross_entropy(functional_call(model, weights, (x,)), y).backward()
    run.finalize()
    assert torch.allclose(run.store.gradients[:], own_gradients(other, x, y), rtol=1e-9, atol=1e-12)


def test_transforms_are_refused_by_name(tmp_path: Path) -> None:
    (x, y), model = data(), network()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], sample: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, parameters, (sample[None],)), label[None])

    run = logix.init("run", model, full(tmp_path), verbose=False)
    refused = pytest.raises(CaptureError, match=r"module '0' was called inside a transform of torch\.func")
    with refused, run(data_id=range(SAMPLES)):
        vmap(grad(loss), (None, 0, 0))(weights, x, y)
    with run(data_id=range(SAMPLES)):  # the run goes on
        F.cross_entropy(model(x), y).backward()
    run.finalize()
    assert len(run.store) == SAMPLES
