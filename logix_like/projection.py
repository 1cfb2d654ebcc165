"""Kronecker projections: a module's gradient ``G [d_out, d_in]`` becomes ``P_out G P_in^T``.

This is LoGra (Choe et al. 2024, arXiv 2405.13954).

Random matrices are drawn from a counter-based generator (Philox) keyed by the seed and the module's
name, on the CPU, so that they are the same on every device and in every process; they are stored with
the rows all the same, and a later process reads them rather than draws them. They are scaled to
``E[P^T P] = I``, so that dot products of projected gradients are unbiased.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from logix_like.errors import ConfigError

WIDE = 512
"""From this width on, the automatic rank is 32 instead of 16."""


class Init(ABC):
    """How one side's matrix ``[rank, dim]`` is made."""

    needs_moment = False
    """Whether the matrix depends on data (the side's second moment)."""
    picks = False
    """Whether only the coordinates of the largest curvature are kept, as many as ``rank * rank`` a module make."""

    @abstractmethod
    def matrix(self, key: str, rank: int, dim: int, moment: Tensor | None) -> Tensor | None:
        """The matrix ``[rank, dim]`` in float32, or None for the identity.

        ``key`` names the side; ``moment`` is the second moment ``[dim, dim]`` of what is projected (or
        its diagonal ``[dim]``), given only if ``needs_moment``.
        """

    def capped(self, rank: int, dim: int) -> int:
        """The rank that can be had in ``dim`` dimensions."""
        return min(rank, dim)


class Gaussian(Init):
    """Independent normal entries of variance 1 / rank."""

    def matrix(self, key: str, rank: int, dim: int, moment: Tensor | None) -> Tensor:
        return (_normal(key, rank, dim) / math.sqrt(rank)).float()


class Orthogonal(Init):
    """Orthonormal rows (QR of a normal matrix) times sqrt(dim / rank); a rotation at full rank."""

    def matrix(self, key: str, rank: int, dim: int, moment: Tensor | None) -> Tensor:
        columns, triangle = torch.linalg.qr(_normal(key, rank, dim).T)
        # With the signs of R's diagonal fixed, Q is uniform (Haar) and does not depend on LAPACK's choice.
        rows: Tensor = (columns * triangle.diagonal().sign()).T
        return (rows * math.sqrt(dim / rank)).float().contiguous()


class Pca(Init):
    """The leading eigenvectors of what is projected, from a warm-up; lossless on data of that rank."""

    needs_moment = True

    def matrix(self, key: str, rank: int, dim: int, moment: Tensor | None) -> Tensor:
        return _leading_vectors(rank, dim, moment)


class Eigen(Init):
    """Coordinates of the Kronecker eigenbasis: of every module's leading ``4 rank x 4 rank`` the largest.

    All modules together keep as many as with ``rank * rank`` each, a module of large gradients more of them: those
    of the largest curvature carry most of a score. In this basis EK-FAC is a diagonal.
    """

    needs_moment = True
    picks = True

    def matrix(self, key: str, rank: int, dim: int, moment: Tensor | None) -> Tensor:
        return _leading_vectors(rank, dim, moment)

    def capped(self, rank: int, dim: int) -> int:
        return min(4 * rank, dim)


class Identity(Init):
    """No projection: full gradients are stored."""

    def matrix(self, key: str, rank: int, dim: int, moment: Tensor | None) -> None:
        return None

    def capped(self, rank: int, dim: int) -> int:
        return dim


INITS: Mapping[str, Init] = MappingProxyType(
    {"orthogonal": Orthogonal(), "gaussian": Gaussian(), "pca": Pca(), "eigen": Eigen(), "identity": Identity()}
)


def largest_coordinates(
    moments: Mapping[str, tuple[Tensor, Tensor]], ranks: Mapping[str, tuple[int, int]], count: int
) -> dict[str, tuple[int, ...]]:
    """The ``count`` coordinates of largest curvature of all blocks together, by block.

    They are positions in a block's ``[rank_out, rank_in]``, whose curvatures are the products of its sides' leading
    eigenvalues. Every block keeps at least its largest one. ``moments`` are means ``(input, output)`` of each block.
    """
    products = {
        name: torch.outer(_leading_values(moments[name][1], out), _leading_values(moments[name][0], inward)).flatten()
        for name, (out, inward) in ranks.items()
    }
    for values in products.values():
        values[values.argmax()] = math.inf
    chosen = torch.zeros(sum(map(len, products.values())), dtype=torch.bool)
    chosen[torch.cat(list(products.values())).argsort(descending=True, stable=True)[: max(count, len(products))]] = True
    parts = chosen.split([len(values) for values in products.values()])
    return {name: tuple(part.nonzero()[:, 0].tolist()) for name, part in zip(products, parts, strict=True)}


def _leading_vectors(rank: int, dim: int, moment: Tensor | None) -> Tensor:
    if moment is None:
        raise ConfigError("this init needs the second moments of a warm-up, and none were gathered")
    if moment.ndim == 1:
        return torch.eye(dim)[moment.argsort(descending=True, stable=True)[:rank]]
    vectors = torch.linalg.eigh(moment.double())[1].flip(1)[:, :rank]
    # An eigenvector's sign is arbitrary: make its largest entry positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    rows: Tensor = (vectors * largest.sign()).T
    return rows.float().contiguous()


def _leading_values(moment: Tensor, rank: int) -> Tensor:
    values = moment.double() if moment.ndim == 1 else torch.linalg.eigvalsh(moment.double())
    return values.sort(descending=True).values[:rank].clamp_min(0)


def rank_for(name: str, shape: tuple[int, int], rank: int | Mapping[str, int] | Literal["auto"]) -> int:
    """The configured rank of module ``name`` with a gradient of ``shape``; the first glob that fits wins."""
    if isinstance(rank, Mapping):
        for pattern, value in rank.items():
            if fnmatchcase(name, pattern):
                return value
        raise ConfigError(
            f"projection.rank has no pattern for module {name!r} (patterns: {', '.join(rank)}); add '*' as the last one"
        )
    if rank == "auto":
        return 32 if max(shape) >= WIDE else 16
    return rank


def _normal(key: str, rank: int, dim: int) -> Tensor:
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.standard_normal((rank, dim)))
