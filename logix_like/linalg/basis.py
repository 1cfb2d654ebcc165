"""Orthonormal bases of one side of a Kronecker product, in parts where the side is wide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logix_like.linalg.eigen import symmetric_eigen


@dataclass(frozen=True)
class Basis:
    """An orthogonal matrix ``U [width, width]``, block-diagonal in consecutive parts."""

    parts: tuple[Tensor, ...]
    """Each ``[w, w]``, vectors in columns; the widths add up to ``width``."""

    @property
    def width(self) -> int:
        """Size of the vectors."""
        return sum(len(part) for part in self.parts)

    def rotate(self, vectors: Tensor) -> Tensor:
        """Coordinates ``x U`` of ``vectors [..., width]``, in their dtype and on their device."""
        return self._times(vectors, [part.to(vectors) for part in self.parts])

    def restore(self, coordinates: Tensor) -> Tensor:
        """``x U^T``: the vectors that have the ``coordinates [..., width]``."""
        return self._times(coordinates, [part.to(coordinates).mT for part in self.parts])

    def to(self, like: Tensor) -> Basis:
        """The same in the dtype and on the device of ``like``."""
        return Basis(tuple(part.to(like) for part in self.parts))

    def mixing(self, other: Basis) -> Basis:
        """``(U^T V)^2``, number by number, for the basis ``V``: squares' means ``x`` are ``x (U^T V)^2`` in ``V``.

        Exact where different coordinates in ``U`` are uncorrelated.
        """
        return Basis(tuple((mine.mT @ its).square() for mine, its in zip(self.parts, other.parts, strict=True)))

    def _times(self, vectors: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        pieces = vectors.split([len(matrix) for matrix in matrices], -1)
        with torch.autocast(vectors.device.type, enabled=False):  # which is for the model's products, not for ours
            found = [piece @ matrix for piece, matrix in zip(pieces, matrices, strict=True)]
        return torch.cat(found, -1) if len(found) > 1 else found[0]


def part_sizes(width: int, most: int) -> list[int]:
    """``width`` in as few parts as possible of at most ``most``, nearly equal."""
    count = -(-width // most)
    return [width // count + (number < width % count) for number in range(count)]


def eigenbasis(moments: Sequence[Tensor]) -> tuple[Tensor, Basis]:
    """Eigenvalues ``[width]``, ascending in each part, and basis of the block-diagonal matrix of ``moments``.

    Both are float64.
    """
    eigen = [symmetric_eigen(moment) for moment in moments]
    return torch.cat([part.values for part in eigen]), Basis(tuple(part.vectors for part in eigen))
