"""A store of a small training, and queries to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import logix_like as logix
from logix_like.query.gradients import QueryGradients
from tests.cli.calling import WIDTH, logged
from tests.training import SAMPLES


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> logix.Run:
    return logged(tmp_path_factory.mktemp("cli"), [f"s{i}" for i in range(SAMPLES - 1)] + [99])


@pytest.fixture(scope="package")
def asked(run: logix.Run) -> QueryGradients:
    generator = torch.Generator().manual_seed(1)
    rows = run.store.gradients[:2] + 0.01 * torch.randn(2, WIDTH, generator=generator)
    return QueryGradients(("first", 2), rows, run.store.modules)


@pytest.fixture
def queries(asked: QueryGradients, tmp_path: Path) -> Path:
    return asked.save(tmp_path / "queries.npz")
