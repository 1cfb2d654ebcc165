"""Squared lengths in a preconditioner's geometry, ``g^T F^-1 g``: what comparisons divide by, and self-influence."""

from __future__ import annotations

import torch
from torch import Tensor

from logix_like.query.fitting import Fit, Recent
from logix_like.query.scan import Candidates


class RowLengths:
    """Those of all rows that can be ranked, kept for the fits that were asked with last."""

    def __init__(self) -> None:
        self._kept: Recent[Tensor] = Recent(4)

    def of(self, candidates: Candidates, fit: Fit, progress: bool | None) -> Tensor:
        """``[rows]``, float64: times the rows' factor squared; 0 for rows that are not wanted."""

        def compute() -> Tensor:
            lengths = torch.zeros(len(candidates.rows), dtype=torch.float64)
            with candidates.buffer() as buffer:
                for tile in candidates.tiles(progress, "self-influence"):
                    for start, stop, values in tile.pieces(buffer):
                        lengths[tile.positions[start:stop]] = squared_lengths(values, fit.preconditioner.apply(values))
            return lengths

        # Sums have the key of the means whose multiples they are: what is kept is without the factor.
        key, factor = (candidates.rows.key, fit.key), candidates.factor
        lengths = self._kept.get(key, compute) if candidates.complete else compute()
        return lengths if factor is None else lengths * factor.square()


def squared_lengths(rows: Tensor, preconditioned: Tensor) -> Tensor:
    """``[n]``: ``g^T F^-1 g`` of ``rows [n, width]``, in float64, where squares of small numbers do not underflow.

    Rounding makes none negative.
    """
    return (rows.double() * preconditioned.double()).sum(dim=1).clamp_min(0)
