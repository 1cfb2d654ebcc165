"""FAISS: an index of rows kept in memory, asked for candidates that are then scored exactly.

faiss-cpu and faiss-gpu own the same module ``faiss``: install one of them, never both. The module is
imported on first use, after torch, since the order decides which OpenMP runtime the process gets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logix_like.errors import MissingDependencyError
from logix_like.query.modes import Mode
from logix_like.query.scan import Candidates


class FlatIndex:
    """Every valid row as float32, in one :class:`faiss.IndexFlatIP`.

    Rows are laid out for one mode and one preconditioner, so that the queries' preconditioned gradients
    are all that a search needs. Takes 4 bytes for each number of the rows.
    """

    def __init__(
        self,
        candidates: Candidates,
        mode: Mode,
        lengths: Tensor,
        factor: Tensor | None,
        progress: bool | None,
    ) -> None:
        """Read the rows of ``candidates`` in a stream.

        Args:
            candidates: The rows to index.
            mode: How they are scored.
            lengths: ``[rows]``, squared lengths of the rows, times ``factor`` squared.
            factor: ``[rows]`` or None: what each row is multiplied by.
            progress: As in :meth:`Candidates.tiles`.
        """
        faiss = _faiss()
        self._mode = mode
        self._positions = candidates.positions()
        self._index: Any = None
        for tile in candidates.tiles(progress, "index"):
            rows = tile.values if factor is None else tile.values * factor[tile.positions, None]
            vectors = mode.indexed(rows, lengths[tile.positions]).to(torch.float32)
            if self._index is None:
                self._index = faiss.IndexFlatIP(vectors.shape[1])
            self._index.add(np.ascontiguousarray(vectors.numpy()))

    def candidates(self, queries: Tensor, k: int, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows that may be among the ``k`` highest and ``k`` lowest of preconditioned ``queries``.

        Only rows where ``wanted [rows]`` holds are looked at, all without it. Both results are positions
        ``[queries, c]`` among the store's rows, ``c`` at least ``k``.
        """
        asked = self._mode.asked(queries).to(torch.float32).numpy()
        parameters, limit = None, len(self._positions)
        if wanted is not None:
            inside = wanted[self._positions].nonzero().flatten().numpy()
            parameters, limit = _faiss().SearchParameters(sel=_faiss().IDSelectorBatch(inside)), len(inside)
        count = min(limit, 2 * k + MARGIN)
        highest, lowest = (self._search(side, count, parameters) for side in (asked, -asked))
        return self._positions[torch.from_numpy(highest)], self._positions[torch.from_numpy(lowest)]

    def _search(self, asked: NDArray[np.float32], count: int, parameters: Any) -> NDArray[np.int64]:
        _, found = self._index.search(np.ascontiguousarray(asked), count, params=parameters)
        return np.asarray(found, dtype=np.int64)


MARGIN = 32
"""Candidates beyond twice k, so that rows whose scores differ by rounding alone are ranked exactly."""


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "engine='faiss' needs faiss, which is not installed: pip install 'logix_like[faiss]' "
            "(or logix_like[gpu] for faiss-gpu; never both), or ask with engine='exact'"
        ) from error
    return faiss
