from __future__ import annotations

import torch

from logix_like.linalg.eigen import symmetric_eigen, symmetrise

EXACT = 1e-12
"""Float64 rounding of a product of small matrices."""


def test_symmetrise_is_the_mean_with_the_transpose() -> None:
    matrix = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    assert torch.equal(symmetrise(matrix), torch.tensor([[1.0, 3.0], [3.0, 3.0]]))
    assert torch.equal(matrix, torch.tensor([[1.0, 2.0], [4.0, 3.0]]))


def test_eigenvectors_rebuild_the_matrix() -> None:
    root = torch.randn(5, 3, dtype=torch.float64)
    matrix = root @ root.T
    eigen = symmetric_eigen(matrix)
    rebuilt = eigen.vectors @ eigen.values.diag() @ eigen.vectors.T
    torch.testing.assert_close(rebuilt, matrix, rtol=EXACT, atol=EXACT)


def test_rounding_below_zero_is_clamped() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1e-9, 0.5]))
    assert symmetric_eigen(matrix).values.tolist() == [0.0, 0.5, 1.0]


def test_float32_is_decomposed_in_float64() -> None:
    assert symmetric_eigen(torch.eye(2)).vectors.dtype == torch.float64
