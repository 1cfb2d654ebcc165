from __future__ import annotations

import pytest
import torch
from torch import Tensor

from logix_like.linalg.eigen import symmetric_eigen
from logix_like.linalg.kronecker import product_eigenvalues, scale_in_eigenbasis

EXACT = 1e-10
"""Float64 with condition numbers up to about 1e3."""


def _factor(size: int) -> Tensor:
    root = torch.randn(3 * size, size, dtype=torch.float64)
    return root.T @ root / (3 * size)


def test_the_damped_inverse_equals_the_dense_one() -> None:
    output, input_ = _factor(3), _factor(4)
    s, a = symmetric_eigen(output), symmetric_eigen(input_)
    weights = 1 / (product_eigenvalues(s.values, a.values) + 0.2)
    rows = torch.randn(5, 12, dtype=torch.float64)
    dense = torch.kron(output, input_) + 0.2 * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.solve(dense, rows.T).T
    applied = scale_in_eigenbasis(rows, s.vectors, a.vectors, weights)
    torch.testing.assert_close(applied, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("sides", [(2, 3), (3, 2), (1, 4), (4, 1)])
def test_stacked_modules_equal_one_by_one(sides: tuple[int, int]) -> None:
    out, inn = sides
    rows = torch.randn(6, 5, out * inn, dtype=torch.float64)
    bases = torch.randn(6, out, out).double(), torch.randn(6, inn, inn).double(), torch.randn(6, out, inn).double()
    together = scale_in_eigenbasis(rows, *bases)
    for module in range(6):
        alone = scale_in_eigenbasis(rows[module], *(basis[module] for basis in bases))
        torch.testing.assert_close(together[module], alone, rtol=EXACT, atol=EXACT)
