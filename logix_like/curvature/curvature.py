"""Curvature at full size: Kronecker factors of every block, and EK-FAC's eigenvalues in their basis."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from logix_like.curvature.sweep import Blocks
from logix_like.damping import Damping, DampingSetting
from logix_like.errors import ModelMismatchError
from logix_like.layout import Layout
from logix_like.linalg.basis import Basis
from logix_like.linalg.inverse import damped_reciprocal
from logix_like.weights import fingerprint

Kind = Literal["kfac", "ekfac"]
Labels = Literal["sampled", "empirical"]

Function = Callable[[str, Tensor], Tensor]
"""``f(block, eigenvalues [d_out, d_in]) -> [d_out, d_in]``, elementwise."""


@dataclass(frozen=True)
class Fisher:
    """What a curvature was fitted to."""

    labels: Labels
    """``sampled`` from the model (the true Fisher) or ``empirical`` (those of the data)."""
    samples: int
    """How many samples were seen."""
    weights: str
    """Fingerprint of the model's weights; empty where there were several."""


class Curvature:
    """The block-diagonal curvature ``U diag(Lambda) U^T`` of a model's tracked modules.

    ``U = U_S (x) U_A`` are the eigenvectors of each block's Kronecker factors; ``Lambda`` the products of their
    eigenvalues (``kfac``: Martens and Grosse 2015) or the mean squares of per-sample gradients in that basis
    (``ekfac``: George et al. 2018). Made by :func:`fit_curvature`, saved by :func:`save_curvature`.
    """

    def __init__(
        self,
        kind: Kind,
        layout: Layout,
        bases: Mapping[str, tuple[Basis, Basis]],
        eigenvalues: Mapping[str, Tensor],
        fisher: Fisher,
    ) -> None:
        self.kind: Kind = kind
        self.layout = layout
        """The blocks, in the order of the model's modules, at full size."""
        self.bases = dict(bases)
        """By block: ``U_A`` of its input group and ``U_S``."""
        self.eigenvalues = dict(eigenvalues)
        """By block: ``Lambda [d_out, d_in]``, float64, none negative; ``E[g g^T]`` of samples' summed losses."""
        self.fisher = fisher

    def __repr__(self) -> str:
        numbers = sum(values.numel() for values in self.eigenvalues.values())
        return (
            f"Curvature({self.kind}, {len(self.layout)} modules, {numbers:,} parameters, {self.fisher.labels} labels, "
            f"{self.fisher.samples:,} samples)"
        )

    def apply(self, f: Function, vectors: Blocks) -> dict[str, Tensor]:
        """``U f(Lambda) U^T v`` for ``vectors``: by block ``[n, d_out, d_in]``, not changed.

        Blocks may be left out. Works in the vectors' dtype and on their device; ``f`` gets float64 eigenvalues.
        """
        return {name: self._apply(name, f(name, self.eigenvalues[name]), vector) for name, vector in vectors.items()}

    def rotate(self, vectors: Blocks) -> dict[str, Tensor]:
        """Coordinates ``U^T v`` in the eigenbasis, shaped as ``vectors``."""
        return {name: self.bases[name][0].rotate(self.bases[name][1].rotate(v.mT).mT) for name, v in vectors.items()}

    def restore(self, coordinates: Blocks) -> dict[str, Tensor]:
        """``U c``: the vectors that have these coordinates."""
        return {
            name: self.bases[name][0].restore(self.bases[name][1].restore(c.mT).mT) for name, c in coordinates.items()
        }

    def diagonal_in(self, bases: Mapping[str, tuple[Basis, Basis]]) -> dict[str, Tensor]:
        """The diagonal of this curvature in other ``bases``: by block, as the eigenvalues; the trace stays.

        A block without eigenvalues above 0, which may have had no basis of its own, has none there.
        """
        found = {}
        for name, values in self.eigenvalues.items():
            found[name] = values
            if bool(values.any()):
                inward, outward = (
                    mine.mixing(other) for mine, other in zip(self.bases[name], bases[name], strict=True)
                )
                found[name] = outward.rotate(inward.rotate(values).mT).mT
        return found

    def moments(self, block: str) -> tuple[Tensor, Tensor]:
        """Second moments ``[d_in, d_in]`` and ``[d_out, d_out]`` of the block's gradients along either side.

        They are what ``projection.init: pca`` and ``eigen`` are made from.
        """
        values = self.eigenvalues[block]
        # So scaled that products of the moments' eigenvalues are the block's, where it is a Kronecker product.
        scale = values.sum().clamp_min(torch.finfo(values.dtype).tiny).sqrt()
        inward, outward = (
            basis.restore(basis.restore((weights / scale).diag()).mT)
            for basis, weights in zip(self.bases[block], (values.sum(0), values.sum(1)), strict=True)
        )
        return inward, outward

    def shift(self, block: str, damping: DampingSetting) -> float:
        """``lambda`` of a block, by a setting of :mod:`logix_like.damping`."""
        return Damping.of(damping).shift(self.eigenvalues[block].mean().item())

    def weights(self, f: Function) -> dict[str, Tensor]:
        """``f(Lambda)`` of every block."""
        return {name: f(name, values) for name, values in self.eigenvalues.items()}

    def require_model(self, model: nn.Module, layout: Layout) -> None:
        """Raise :class:`ModelMismatchError` unless ``layout`` is this one's; warn if the weights are others."""
        if self.layout.names != layout.names or any(
            mine.shape != theirs.shape or mine.kind != theirs.kind
            for mine, theirs in zip(self.layout, layout, strict=True)
        ):
            self.layout.require_same(layout)
            raise ModelMismatchError(f"the curvature has the modules {self.layout.names}, the model {layout.names}")
        self.compare_weights(model)

    def compare_weights(self, model: nn.Module) -> None:
        """Warn if the model's weights are not those of the fit."""
        if self.fisher.weights and self.fisher.weights != fingerprint(model):
            warnings.warn(
                "the model's weights are not those that the curvature was fitted at: load the weights that belong to "
                "it, or fit it again",
                RuntimeWarning,
                stacklevel=4,
            )

    def _apply(self, name: str, weights: Tensor, vector: Tensor) -> Tensor:
        rotated = self.rotate({name: vector})[name]
        return self.restore({name: rotated.mul_(weights.to(rotated))})[name]


def damped_inverse_of(damping: DampingSetting, dtype: torch.dtype = torch.float64) -> Function:
    """``1 / (Lambda + lambda)`` with ``lambda`` = ``damping`` times the mean eigenvalue of the block.

    The other settings of :mod:`logix_like.damping` are taken too.
    A block that was never used has only zeros and gets zeros: it takes no part. The function raises
    :class:`StatisticsError` where a block is singular, so far as gradients of ``dtype`` can tell.
    """
    checked = Damping.of(damping)

    def inverse(block: str, values: Tensor) -> Tensor:
        # A coordinate of rounding alone is a sum of some eps of its gradient, and eigenvalues are its square.
        noise = sum(values.shape) * torch.finfo(dtype).eps ** 2
        return damped_reciprocal(values, checked.shift(values.mean().item()), block, noise).to(values.device)

    return inverse
