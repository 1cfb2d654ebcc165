"""Second moments of the factors: the two Kronecker factors of each block, summed over batches."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from logix_like.curvature.sums import MEMORY, Scratch, Sums
from logix_like.curvature.sweep import Sink, widened
from logix_like.linalg.basis import part_sizes
from logix_like.linalg.products import Precision, products

WIDEST = 8192
"""Sides wider than this are split into parts."""


class FactorSums(Sink):
    """``sum_t a_t a_t^T`` of each input group and ``sum_t d_t d_t^T`` of each block.

    Sides wider than ``most`` are summed in parts, whose products with one another are dropped.
    """

    def __init__(self, most: int, precision: Precision, scratch: Scratch = MEMORY) -> None:
        self._most = most
        self._precision: Precision = precision
        self._mask: Tensor | None = None
        self.sums = Sums(scratch)
        """``input/<group>/<part>``, ``output/<block>/<part>``, ``positions/<group>`` and ``samples``."""

    def begin(self, samples: int, mask: Tensor | None) -> None:
        self._mask = mask
        self.sums.begin(samples)

    def add_input(self, group: str, inputs: Tensor) -> None:
        counted = self._counted(inputs)
        self.sums.count(f"positions/{group}", len(counted))
        self._add(f"input/{group}", counted)

    def add_factors(self, block: str, inputs: Tensor, outputs: Tensor, shared: bool) -> None:
        if not shared:
            self.add_input(block, inputs)
        self._add(f"output/{block}", self._counted(outputs))

    def _counted(self, factor: Tensor) -> Tensor:
        """``[n, width]`` without the positions that the mask leaves out."""
        if self._mask is not None and self._mask.shape == factor.shape[:2]:
            factor = factor[self._mask.bool()]
        return widened(factor).reshape(-1, factor.shape[-1])

    def _add(self, name: str, flat: Tensor) -> None:
        with products(self._precision):
            for number, part in enumerate(flat.split(part_sizes(flat.shape[1], self._most), 1)):
                self.sums.add_product(f"{name}/{number}", part.T, part)


def moments(sums: Mapping[str, Tensor], side: str, name: str) -> list[Tensor]:
    """The mean ``[w, w]`` of each part of the factor ``input`` (over positions) or ``output`` (over samples).

    Empty if the module was never called, or never with a gradient.
    """
    count = sums.get(f"positions/{name}" if side == "input" else "samples")
    found: list[Tensor] = []
    while (total := sums.get(f"{side}/{name}/{len(found)}")) is not None and count is not None:
        found.append(total / count.clamp_min(1).to(total.device))
    return found
