"""Asking an index of plain 8-bit codes: a product of matrices reads them once, for all queries and both sides.

FAISS itself scans its codes once for each query, and once more for the opposite one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE_ROWS = 512
"""So many codes are widened at a time: they stay in the caches."""
TILE_SCORES = 2**22
"""The highest and lowest are picked from about so many scores at a time."""


@dataclass(frozen=True, eq=False)
class Codes:
    """Rows as codes ``c``, which stand for ``c * step`` and what is the same for all rows."""

    codes: Tensor
    """``[rows, d]`` uint8."""
    step: Tensor
    """``[d]``"""

    def extremes(self, asked: Tensor, count: int, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """Numbers ``[queries, count]`` of the rows of highest and of lowest product with ``asked [queries, d]``.

        The most extreme come first. Only rows where ``inside [rows]`` holds are named, all without it; at least
        ``count`` of them.
        """
        highest: list[tuple[Tensor, Tensor]] = []
        lowest: list[tuple[Tensor, Tensor]] = []
        step = max(count, TILE_SCORES // len(asked))
        for start in range(0, len(self.codes), step):
            scores = self._scores(asked * self.step, start, min(start + step, len(self.codes)))
            for side, signed in ((highest, scores), (lowest, -scores)):
                if inside is not None:
                    signed = signed.masked_fill(~inside[start : start + step], -torch.inf)
                values, numbers = signed.topk(min(count, signed.shape[1]), dim=1)
                side.append((values, numbers + start))
        return _joined(highest, count), _joined(lowest, count)

    def _scores(self, weights: Tensor, start: int, stop: int) -> Tensor:
        """``[queries, stop - start]``; what is the same for all rows is left out."""
        scores = torch.empty(stop - start, len(weights))
        piece = torch.empty(PIECE_ROWS, self.codes.shape[1])
        for begin in range(start, stop, PIECE_ROWS):
            codes = self.codes[begin : min(begin + PIECE_ROWS, stop)]
            torch.mm(piece[: len(codes)].copy_(codes), weights.T, out=scores[begin - start :][: len(codes)])
        return scores.T.contiguous()


def _joined(parts: list[tuple[Tensor, Tensor]], count: int) -> Tensor:
    values, numbers = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return numbers.gather(1, values.topk(count, dim=1).indices)
