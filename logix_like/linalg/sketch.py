"""Positive semi-definite matrices too large to be held, known by their products with some directions.

The Nystrom approximation of a matrix ``C [k, k]`` from ``Y = C W`` with orthonormal ``W [k, r]`` is
``Y (W^T Y)^-1 Y^T``. It is ``C`` itself where the rank of ``C`` is at most ``r``, and otherwise never larger: ``C``
minus it is positive semi-definite, so that what it leaves of the trace bounds every eigenvalue that it misses (Gittens
and Mahoney 2016, "Revisiting the Nystrom method"; computed as in Frangella, Tropp and Udell 2023, "Randomized Nystrom
preconditioning", algorithm 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logix_like.linalg.eigen import symmetrise


@dataclass(frozen=True)
class Sketch:
    """``C`` is about ``U diag(values) U^T``, and about ``rest`` in every direction outside ``U``."""

    values: Tensor
    """``[r]``, none negative."""
    vectors: Tensor
    """``[k, r]``: ``U``, orthonormal columns."""
    rest: float
    """What is left of the trace, by direction outside ``U``."""

    @property
    def held(self) -> float:
        """The share of the trace that ``values`` make up."""
        inside, size, rank = self.values.sum().item(), *self.vectors.shape
        return inside / total if (total := inside + self.rest * (size - rank)) > 0 else 1.0


def directions(size: int, rank: int) -> Tensor:
    """``W [size, rank]``: the same orthonormal directions whenever they are asked for."""
    normal = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    orthonormal: Tensor = torch.linalg.qr(normal)[0]
    return orthonormal


def nystrom(products: Tensor, trace: float) -> Sketch:
    """The sketch of a matrix of this ``trace`` from its ``products [k, r]`` with :func:`directions`, in float64."""
    chosen = directions(*products.shape)
    size, rank = products.shape
    # Moved away from 0, so that rounding leaves a factor; taken off again at the end.
    shift = torch.finfo(torch.float64).eps * size**0.5 * torch.linalg.matrix_norm(products).item()
    if shift == 0:
        return Sketch(torch.zeros(rank, dtype=torch.float64), chosen, 0.0)
    moved = products + shift * chosen
    factor, failed = torch.linalg.cholesky_ex(symmetrise(chosen.T @ moved))
    while failed.item():  # of a matrix whose products were themselves rounded
        moved = moved + 9 * shift * chosen
        shift *= 10
        factor, failed = torch.linalg.cholesky_ex(symmetrise(chosen.T @ moved))
    root = torch.linalg.solve_triangular(factor.T, moved, upper=True, left=False)
    vectors, singular, _ = torch.linalg.svd(root, full_matrices=False)
    values = (singular.square() - shift).clamp_min(0)
    return Sketch(values, vectors, max(0.0, trace - values.sum().item()) / (size - rank))
