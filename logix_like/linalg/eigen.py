"""Eigenvectors of symmetric positive semi-definite matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Eigen:
    """``M = U diag(values) U^T``."""

    values: Tensor
    """``[k]``, ascending, none negative."""
    vectors: Tensor
    """``[k, k]``: ``U``, eigenvectors in columns."""


def symmetrise(matrix: Tensor) -> Tensor:
    """The symmetric part of ``matrix [..., k, k]``: sums of float32 products are symmetric only nearly."""
    return (matrix + matrix.mT) / 2


def symmetric_eigen(matrix: Tensor) -> Eigen:
    """Eigenvalues and eigenvectors of ``matrix [k, k]``, which is positive semi-definite but for rounding.

    Eigenvalues that rounding made negative are set to 0. Works in float64 whatever the input is.
    """
    values, vectors = torch.linalg.eigh(symmetrise(matrix.to(torch.float64)))
    return Eigen(values.clamp_min(0), vectors)
