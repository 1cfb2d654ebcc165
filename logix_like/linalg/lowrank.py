"""Matrices kept as products of two narrow ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``n`` matrices ``left right``."""

    left: Tensor
    """``[n, d_out, r]``."""
    right: Tensor
    """``[n, r, d_in]``."""

    def whole(self) -> Tensor:
        """``[n, d_out, d_in]``."""
        return self.left @ self.right


def low_rank(matrices: Tensor, rank: int) -> Tensor | LowRank:
    """The best approximation of rank ``rank`` of each of ``matrices [n, d_out, d_in]`` (truncated SVD).

    Where two factors would hold no less than the matrix, the matrix itself is returned.
    """
    _, d_out, d_in = matrices.shape
    if rank * (d_out + d_in) >= d_out * d_in:
        return matrices
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    return LowRank(left[..., :rank] * values[:, None, :rank], right[:, :rank])
