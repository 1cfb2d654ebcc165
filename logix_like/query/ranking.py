"""The largest and the smallest scores of a stream, with ties broken by row order."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningTop:
    """The k largest (or smallest) scores of each query so far.

    Equal scores rank by row order, so an answer does not depend on how rows were cut into pieces.
    """

    def __init__(self, k: int, *, largest: bool) -> None:
        self._k = k
        self._sign = 1 if largest else -1
        self._scores: Tensor | None = None
        self._positions: Tensor | None = None

    @property
    def threshold(self) -> Tensor | None:
        """``[queries]``: the k-th best score (its negative, where the smallest are kept); None until there are k."""
        full = self._scores is not None and self._scores.shape[1] == self._k
        return self._scores[:, -1] if full and self._scores is not None else None

    def update(self, scores: Tensor, positions: Tensor) -> None:
        """Take in ``scores [queries, n]`` of the rows at ``positions``, which follow all rows before.

        Positions ascend; they are ``[n]``, or ``[queries, n]`` where each query has rows of its own (filled up with
        rows of the worst possible score).
        """
        signed = scores if self._sign > 0 else -scores
        positions = positions.expand(scores.shape)
        if self._scores is None or self._positions is None:
            self._scores, chosen = stable_top(signed, self._k)
            self._positions = positions.gather(1, chosen)
            return
        rising = torch.ones(len(signed), dtype=torch.bool)
        if self._scores.shape[1] == self._k:
            # Only a larger score can enter: an equal one comes later in row order.
            rising = signed.amax(dim=1) > self._scores[:, -1]
            if not bool(rising.any()):
                return
        self._merge(rising.nonzero().flatten(), signed, positions)

    def _merge(self, queries: Tensor, signed: Tensor, positions: Tensor) -> None:
        assert self._scores is not None and self._positions is not None
        best, chosen = stable_top(signed[queries], self._k)
        joined = torch.cat([self._scores[queries], best], dim=1)
        places = torch.cat([self._positions[queries], positions[queries].gather(1, chosen)], dim=1)
        best, chosen = stable_top(joined, self._k)
        if len(queries) == len(self._scores):  # always so until k scores are held: the width grows
            self._scores, self._positions = best, places.gather(1, chosen)
            return
        self._scores[queries], self._positions[queries] = best, places.gather(1, chosen)

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores and positions ``[queries, k]``, the most extreme first."""
        if self._scores is None or self._positions is None:
            raise ValueError("no score was taken in")
        return self._scores * self._sign, self._positions


def stable_top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``min(k, n)`` largest of ``scores [queries, n]`` and their columns; of equal ones the first."""
    k, columns = min(k, scores.shape[1]), scores.shape[1]
    best, chosen = scores.topk(min(k + 1, columns), dim=1)
    if bool((best[:, 1:] == best[:, :-1]).any()):
        # topk orders equal scores, and picks among them, as it likes; a stable sort keeps them in order.
        best, chosen = scores.sort(dim=1, descending=True, stable=True)
    return best[:, :k].clone(), chosen[:, :k].clone()
