"""Damped inverses that refuse to invent an answer for a singular matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from logix_like.errors import StatisticsError
from logix_like.linalg.eigen import symmetrise
from logix_like.linalg.finite import require_finite


def damped_inverse(matrix: Tensor, damping: float, name: str, rank: int | None = None) -> Tensor:
    """``(matrix + damping I)^-1`` of a positive semi-definite ``matrix [k, k]``, by Cholesky in float64.

    A matrix of zeros without damping (a module that was never used) has the inverse 0 by definition, so
    that the module takes no part in any score. ``rank`` is the largest that the matrix can have, where that is known:
    the rounding of float32 products can make it look larger.

    Raises:
        StatisticsError: the damped matrix is singular to working precision, or not finite; names the module ``name``.
    """
    require_finite(matrix, name)
    damped = symmetrise(matrix.to(torch.float64))
    if damping == 0 and not damped.any():
        return damped
    if damping == 0 and rank is not None and rank < len(damped):
        raise _singular(name, len(damped), damping)
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    pivots = factor.diagonal().square()
    if failed.item() or _negligible(pivots.min(), damped.diagonal().max() * len(damped)):
        raise _singular(name, len(damped), damping)
    return torch.cholesky_inverse(factor)


def damped_reciprocal(values: Tensor, damping: float, name: str, noise: float = 0.0) -> Tensor:
    """``1 / (values + damping)`` elementwise for eigenvalues ``values``, none negative, in float64.

    Values that are all zero, without damping, have the reciprocal 0, as in :func:`damped_inverse`. Without damping,
    ``noise`` is the share of the largest below which a value says nothing.

    Raises:
        StatisticsError: a damped value is 0 to working precision, or not finite; names the module ``name``.
    """
    require_finite(values, name)
    damped = values.to(torch.float64) + damping
    if not damped.any():
        return damped
    if _negligible(damped.min(), damped.max()) or (damping == 0 and not damped.min() > noise * damped.max()):
        raise _singular(name, values.numel(), damping)
    return damped.reciprocal()


def _negligible(smallest: Tensor, scale: Tensor) -> bool:
    """Whether rounding in the sums behind ``scale`` could have made ``smallest`` out of nothing."""
    return not smallest.item() > torch.finfo(torch.float64).eps * scale.item()


def _singular(name: str, size: int, damping: float) -> StatisticsError:
    return StatisticsError(
        f"the curvature of module {name!r} ({size} numbers) is singular with damping {damping:.3g}: "
        "its samples do not span the block; ask with a larger damping"
    )
