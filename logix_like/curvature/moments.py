"""Second moments of the factors: the two Kronecker factors of each block, summed over batches."""

from __future__ import annotations

import torch
from torch import Tensor

from logix_like.curvature.sweep import Sink, widened
from logix_like.linalg.basis import part_sizes
from logix_like.linalg.products import Precision, products


class FactorSums(Sink):
    """``sum_t a_t a_t^T`` of each input group and ``sum_t d_t d_t^T`` of each block.

    Sides wider than ``most`` are summed in parts, whose products with one another are dropped.
    """

    def __init__(self, most: int, precision: Precision) -> None:
        self._most = most
        self._precision: Precision = precision
        self._mask: Tensor | None = None
        self.sums: dict[str, Tensor] = {}
        """``input/<group>/<part>``, ``output/<block>/<part>``, ``positions/<group>`` and ``samples``; float64."""

    def begin(self, samples: int, mask: Tensor | None) -> None:
        self._mask = mask
        self._count("samples", samples)

    def add_input(self, group: str, inputs: Tensor) -> None:
        inputs, positions = self._counted(inputs)
        self._count(f"positions/{group}", positions)
        self._add(f"input/{group}", inputs)

    def add_factors(self, block: str, inputs: Tensor, outputs: Tensor, shared: bool) -> None:
        if not shared:
            self.add_input(block, inputs)
        self._add(f"output/{block}", self._counted(outputs)[0])

    def moments(self, side: str, name: str) -> list[Tensor]:
        """The mean ``[w, w]`` of each part of the factor ``input`` (over positions) or ``output`` (over samples).

        Empty if the module was never called, or never with a gradient.
        """
        count = self.sums.get(f"positions/{name}" if side == "input" else "samples")
        found: list[Tensor] = []
        while (total := self.sums.get(f"{side}/{name}/{len(found)}")) is not None and count is not None:
            found.append(total / count.clamp_min(1).to(total.device))
        return found

    def _counted(self, factor: Tensor) -> tuple[Tensor, int]:
        """``[n, width]`` without the positions that the mask leaves out, and how many are left."""
        if self._mask is not None and self._mask.shape == factor.shape[:2]:
            factor = factor[self._mask.bool()]
        flat = widened(factor).reshape(-1, factor.shape[-1])
        return flat, len(flat)

    def _add(self, name: str, flat: Tensor) -> None:
        with products(self._precision):
            for number, part in enumerate(flat.split(part_sizes(flat.shape[1], self._most), 1)):
                moment, key = part.T @ part, f"{name}/{number}"
                if key in self.sums:  # sums that were restored lie on the CPU
                    self.sums[key] = self.sums[key].to(moment.device).add_(moment)
                else:
                    self.sums[key] = moment.double()

    def _count(self, name: str, number: int) -> None:
        self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + number
