from __future__ import annotations

import pytest
import torch

from logix_like.errors import StatisticsError
from logix_like.linalg.inverse import damped_inverse, damped_reciprocal

EXACT = 1e-10
"""Float64 with condition numbers up to about 1e3."""


@pytest.fixture
def matrix() -> torch.Tensor:
    root = torch.randn(20, 6, dtype=torch.float64)
    return root.T @ root / 20


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_inverse_equals_the_dense_one(matrix: torch.Tensor, damping: float) -> None:
    before = matrix.clone()
    expected = torch.linalg.inv(matrix + damping * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(damped_inverse(matrix, damping, "m"), expected, rtol=EXACT, atol=EXACT)
    assert torch.equal(matrix, before)


def test_a_rank_deficient_matrix_needs_damping() -> None:
    root = torch.randn(3, 6, dtype=torch.float64)
    matrix = root.T @ root
    with pytest.raises(StatisticsError, match=r"module 'fc' \(6 numbers\) is singular with damping 0.*larger"):
        damped_inverse(matrix, 0.0, "fc")
    assert torch.isfinite(damped_inverse(matrix, 0.1, "fc")).all()


def test_a_zero_matrix_has_the_inverse_zero() -> None:
    assert torch.equal(damped_inverse(torch.zeros(3, 3), 0.0, "m"), torch.zeros(3, 3).double())


def test_nan_is_refused() -> None:
    with pytest.raises(StatisticsError, match="'m'"):
        damped_inverse(torch.full((2, 2), float("nan")), 0.1, "m")
    with pytest.raises(StatisticsError, match="'m'"):
        damped_reciprocal(torch.tensor([1.0, float("nan")]), 0.1, "m")


def test_reciprocals() -> None:
    values = torch.tensor([[0.0, 1.0], [3.0, 7.0]])
    assert damped_reciprocal(values, 1.0, "m").tolist() == [[1.0, 0.5], [0.25, 0.125]]
    assert not damped_reciprocal(torch.zeros(2, 2), 0.0, "m").any()
    with pytest.raises(StatisticsError, match=r"'m' \(4 numbers\) is singular"):
        damped_reciprocal(values, 0.0, "m")
