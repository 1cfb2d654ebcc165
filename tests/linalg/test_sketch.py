"""The Nystrom approximation: exact at low rank, never too large, and honest about what it leaves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from logix_like.linalg.sketch import Sketch, directions, nystrom

SIZE = 60
EXACT = 1e-10
"""Float64; what is added before a factor is taken, and taken off again, rounds the rest."""


def _matrix(rank: int, decay: float = 1.0) -> Tensor:
    basis = torch.linalg.qr(torch.randn(SIZE, rank, dtype=torch.float64))[0]
    return (basis * torch.arange(1, rank + 1).double() ** -decay) @ basis.T


def _sketched(matrix: Tensor, rank: int) -> Sketch:
    return nystrom(matrix @ directions(SIZE, rank), matrix.diagonal().sum().item())


def _whole(sketch: Sketch) -> Tensor:
    return (sketch.vectors * sketch.values) @ sketch.vectors.T


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_a_matrix_of_low_rank_comes_back(rank: int, scale: float) -> None:
    matrix = scale * _matrix(rank)
    found = _sketched(matrix, 20)
    torch.testing.assert_close(_whole(found), matrix, rtol=0, atol=EXACT * scale)
    assert found.held == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(20).double(), rtol=0, atol=EXACT)


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_what_it_leaves_is_positive_and_as_large_as_it_says(decay: float) -> None:
    matrix = _matrix(SIZE, decay)
    found = _sketched(matrix, 20)
    left = torch.linalg.eigvalsh(matrix - _whole(found))
    assert left.min() > -EXACT
    assert left.sum().item() == pytest.approx(found.rest * (SIZE - 20))
    assert found.held == pytest.approx(1 - left.sum().item() / matrix.diagonal().sum().item())
    assert found.held < 1


def test_nothing_is_a_sketch_of_nothing() -> None:
    found = _sketched(torch.zeros(SIZE, SIZE, dtype=torch.float64), 20)
    assert not _whole(found).any() and found.rest == 0 and found.held == 1
