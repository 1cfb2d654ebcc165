"""Naming rows of a scan: ids, and for single visits the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from logix_like.layout import DataId
from logix_like.query.result import Ids, Ranking
from logix_like.query.scan import Candidates
from logix_like.query.scoring import Extremes

Steps = NDArray[np.int64]


def id_array(ids: Sequence[DataId]) -> Ids:
    """Ids as an object array ``[n]``."""
    array = np.empty(len(ids), dtype=object)
    array[:] = list(ids)
    return array


def labels(candidates: Candidates, positions: Tensor, reduce: str) -> tuple[Ids, Steps | None]:
    """Ids, and for single visits the steps, of the rows at ``positions`` (of any shape)."""
    flat, shape = positions.flatten().numpy(), tuple(positions.shape)
    ids = np.asarray(candidates.rows.data_id[flat], dtype=object).reshape(shape)
    if reduce != "none":
        return ids, None
    return ids, np.asarray(candidates.rows.step[flat], dtype=np.int64).reshape(shape)


def ranking(candidates: Candidates, extremes: Extremes, reduce: str, parts: Tensor | None) -> Ranking:
    """Extremes with the names of their rows; scores are rounded to the rows' precision."""
    ids, step = labels(candidates, extremes.positions, reduce)
    return Ranking(ids, extremes.scores.to(candidates.dtype), step, parts)
