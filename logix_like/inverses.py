"""Damped inverses of one block of a curvature, as what they do to rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from logix_like.linalg.kronecker import scale_in_eigenbasis


class Preconditioner(ABC):
    """The damped inverse of one block, or of m blocks of equal size at once.

    Leaves are dataclasses of tensors. Stacking the tensors of m leaves of one kind along a new first
    dimension makes a leaf for all m.
    """

    @abstractmethod
    def apply(self, block: Tensor) -> Tensor:
        """``block [n, k]`` (or ``[m, n, k]`` when stacked) times the inverse; the input is not changed."""


@dataclass(frozen=True)
class Identity(Preconditioner):
    """Leaves rows as they are."""

    def apply(self, block: Tensor) -> Tensor:
        """A copy of ``block``."""
        return block.clone()


@dataclass(frozen=True)
class Diagonal(Preconditioner):
    """Multiplies each number of a row by a weight of its own."""

    weights: Tensor
    """``[k]``."""

    def apply(self, block: Tensor) -> Tensor:
        """``block`` times the weights."""
        return block * self.weights.unsqueeze(-2)


@dataclass(frozen=True)
class Dense(Preconditioner):
    """Multiplies rows by a full symmetric matrix."""

    inverse: Tensor
    """``[k, k]``."""

    def apply(self, block: Tensor) -> Tensor:
        """``block`` times the matrix."""
        return block @ self.inverse


@dataclass(frozen=True)
class Eigenbasis(Preconditioner):
    """Multiplies the coordinates of a row's matrix in a Kronecker eigenbasis by weights."""

    output_basis: Tensor
    """``[rank_out, rank_out]``, eigenvectors in columns."""
    input_basis: Tensor
    """``[rank_in, rank_in]``, eigenvectors in columns."""
    weights: Tensor
    """``[rank_out, rank_in]``."""

    def apply(self, block: Tensor) -> Tensor:
        """``block`` turned into the basis, weighted, and turned back."""
        return scale_in_eigenbasis(block, self.output_basis, self.input_basis, self.weights)


@dataclass(frozen=True)
class LowRank(Preconditioner):
    """Weighs some directions of a row, and all the others alike."""

    basis: Tensor
    """``[k, r]``, orthonormal columns."""
    gains: Tensor
    """``[r]``: the directions' weights less the others'."""
    rest: Tensor
    """``[]``: the others' weight."""

    def apply(self, block: Tensor) -> Tensor:
        """``block`` times the weight of the others, corrected in the basis."""
        inside = (block @ self.basis) * self.gains.unsqueeze(-2)
        return block * self.rest[..., None, None] + inside @ self.basis.mT
