"""Which tokens of a sample its score comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logix_like.errors import QueryError
from logix_like.layout import DataId, Layout


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of the positions of some samples for some queries.

    A sample's gradient is a sum over the positions at which the weights were used, and so is its score:
    ``scores.sum(2) + rest`` is the score of the gradient that was captured. A positive number means that this position
    lowered the query's loss; negative, that it raised it.
    """

    query_id: tuple[DataId, ...]
    """One id for each query."""
    data_id: tuple[DataId, ...]
    """One id for each sample."""
    scores: Tensor
    """``[queries, samples, positions]``."""
    rest: Tensor
    """``[queries, samples]``: what modules add that are used at other positions (a pooled head)."""

    def __repr__(self) -> str:
        """How much there is; :meth:`marks` shows a sample."""
        queries, samples, positions = self.scores.shape
        return f"TokenScores(queries={queries}, samples={samples}, positions={positions})"

    def marks(self, query: int, sample: int, tokens: Sequence[Any]) -> list[tuple[Any, float]]:
        """Pairs of token and score for one sample; ``tokens`` are those of its first positions."""
        line = self.scores[query, sample]
        if len(tokens) > len(line):
            raise QueryError(f"{len(tokens)} tokens were given for {len(line)} positions; give one for each position")
        return list(zip(tokens, line[: len(tokens)].tolist(), strict=True))


class TokenCollector:
    """Scores every position as its factors are captured; no gradient of a single token is ever formed."""

    def __init__(self, layout: Layout, queries: Tensor) -> None:
        """``queries [queries, width]`` are preconditioned."""
        self._layout = layout
        self._queries = queries
        self._positions: Counter[int] = Counter()
        self._sums: dict[int, Tensor] = {}

    def __call__(self, name: str, inward: Tensor, outward: Tensor, shared: bool) -> None:
        """Take in factors ``[samples, positions, rank]`` of one call of the module ``name``."""
        numbers = self._queries[:, self._layout[name].columns]
        asked = self._layout.spread(name, numbers).to(outward)
        scores = torch.einsum("bto,qoi,bti->qbt", outward, asked, inward).cpu()
        count = scores.shape[2]
        self._positions[count] += 1
        self._sums[count] = self._sums[count] + scores if count in self._sums else scores

    def result(self, positions: int | None, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[queries, samples, positions]`` and the rest ``[queries, samples]``, times ``factor [samples]``.

        ``positions`` says how many a sample has; without it, as many as most calls had.
        """
        chosen = self._positions.most_common(1)[0][0] if positions is None and self._positions else positions
        if chosen is None or chosen not in self._sums:
            known = ", ".join(map(str, self._sums)) or "none"
            raise QueryError(f"no tracked module was used at {chosen} positions of each sample; there are {known}")
        rest = torch.zeros(()) + sum(s.sum(2) for count, s in self._sums.items() if count != chosen)
        scores = self._sums[chosen]
        return scores * factor[:, None], rest.expand(scores.shape[:2]) * factor
