"""A run that goes on in a store of which an earlier part is damaged: its own rows are safe, and it ends whole."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import logix_like as logix
from logix_like.store import open_store
from tests.store.test_store_verify import flip
from tests.training import batches, data, network


def logged(root: Path, model: nn.Module, epochs: int, *, resume: bool = False) -> logix.Run:
    """A run of some epochs, not finalized."""
    x, y = data(torch.float32)
    run = logix.init("run", model, {"root": str(root)}, resume=resume, verbose=False)
    for _ in range(epochs):
        for index in batches():
            with run(data_id=index):
                F.cross_entropy(model(x[index]), y[index]).backward()
    return run


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A store whose first start left a damaged chunk."""
    logged(tmp_path, network(torch.float32), 2).finalize()
    (chunk,) = tmp_path.glob("run/writers/0-1/**/gradients/c.0.0")
    flip(chunk, 99)
    return tmp_path


def test_a_run_ends_whole_behind_a_damaged_part(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = logged(damaged, network(torch.float32), 1, resume=True)
    with caplog.at_level(logging.WARNING):
        run.finalize()
    assert "does not match its checksum" in caplog.text and "all rows of this run are safe" in caplog.text
    assert open_store(damaged / "run").writers[-1].state == "closed"
    assert len(open_store(damaged / "run", on_damage="skip")) == 23


def test_samples_are_forgotten_though_others_are_damaged(damaged: Path) -> None:
    run = logged(damaged, network(torch.float32), 1, resume=True)
    assert run.forget([3]) == 3
    run.finalize()
    assert 3 not in open_store(damaged / "run", on_damage="skip").view("last").data_id
