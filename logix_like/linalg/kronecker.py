"""Kronecker-factored matrices, used only through their factors.

A block's gradient is a matrix ``G [r_out, r_in]`` stored row by row, so ``(S (x) A) vec(G)`` is
``vec(S G A)`` for symmetric factors ``S [r_out, r_out]`` and ``A [r_in, r_in]``. With
``S = U_S diag(s) U_S^T`` and ``A = U_A diag(a) U_A^T``, ``S (x) A + lambda I`` is diagonal in the
joint basis ``U_S (x) U_A`` with the values ``s_o a_i + lambda`` (Grosse et al. 2023, eq. 18-20).
Damping each factor on its own is another matrix and is not used here.
"""

from __future__ import annotations

from torch import Tensor


def product_eigenvalues(output_values: Tensor, input_values: Tensor) -> Tensor:
    """Eigenvalues ``s_o a_i`` of ``S (x) A``: ``[r_out, r_in]``."""
    return output_values[:, None] * input_values[None, :]


def scale_in_eigenbasis(blocks: Tensor, output_basis: Tensor, input_basis: Tensor, weights: Tensor) -> Tensor:
    """``U_S (weights * (U_S^T G U_A)) U_A^T`` for every row of ``blocks``.

    Shapes: ``blocks [..., n, r_out * r_in]``, bases ``[..., r, r]`` and ``weights [..., r_out, r_in]``,
    with the same leading dimensions. The result has the shape of ``blocks``.
    """
    r_out, r_in = weights.shape[-2:]
    stack = blocks.shape[:-1]
    # Samples and one side make one long dimension, so that each product is one call for all samples.
    rotated = blocks.reshape(*stack[:-1], -1, r_in) @ input_basis
    rotated = _swap_sides(rotated, r_out) @ output_basis
    rotated = rotated.reshape(*stack, r_in, r_out) * weights.mT.unsqueeze(-3)
    rotated = rotated.flatten(-3, -2) @ output_basis.mT
    rotated = _swap_sides(rotated, r_in) @ input_basis.mT
    return rotated.reshape(blocks.shape)


def _swap_sides(matrices: Tensor, rows: int) -> Tensor:
    """``[..., n * rows, columns] -> [..., n * columns, rows]``: each of the n matrices transposed."""
    *stack, _, columns = matrices.shape
    return matrices.reshape(*stack, -1, rows, columns).transpose(-1, -2).reshape(*stack, -1, rows)
