"""Activation checkpointing of both kinds in a bare loop; the zoo of tests/models.py has it too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import logix_like as logix
from tests.models import BATCH, Checkpointed
from tests.training import full, own_gradients


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_rows(tmp_path: Path, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant).double()
    x, y = torch.randn(BATCH, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    run = logix.init("run", model, full(tmp_path), verbose=False)
    with run(data_id=range(BATCH)):
        F.cross_entropy(model(x), y).backward()
    model.zero_grad()
    run.finalize()
    assert torch.allclose(run.store.gradients[:], own_gradients(model, x, y), rtol=1e-9, atol=1e-12)


def test_a_checkpointed_attention_with_dropout_is_captured(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True).double()
    x, rows = torch.randn(3, 4, 8, dtype=torch.float64), []
    for name in ("plain", "checkpointed"):
        run = logix.init(name, layer, full(tmp_path, loss_reduction="sum"), verbose=False)
        torch.manual_seed(1)
        with run(data_id=range(3)):
            out = layer(x) if name == "plain" else checkpoint(layer, x, use_reentrant=False)
            out.pow(2).sum().backward()
        run.finalize()
        rows.append(run.store.gradients[:])
    assert torch.allclose(rows[0], rows[1], rtol=1e-9, atol=1e-12)
