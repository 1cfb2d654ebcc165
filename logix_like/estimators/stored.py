"""The scores of a run's store, as an estimator among the others."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from logix_like.estimators.base import Estimator
from logix_like.query.result import Ids, InfluenceResult, SelfInfluence


class Answering(Protocol):
    """What is asked: a :class:`~logix_like.Run`."""

    def compute_influence_all(self, query: Any, k: int | None = None, **options: Any) -> InfluenceResult:
        """Scores of all stored samples."""

    def compute_self_influence(self, query: Any = None, **options: Any) -> SelfInfluence:
        """Self-influence of all stored samples."""


class StoredInfluence(Estimator):
    """``g_q^T (F + lambda I)^-1 g_i`` from the rows of a run's store (LoGra, Choe et al. 2024, and beyond it).

    A query is what the run's ``query`` or ``query_fn`` gave.

    Args:
        run: The run, logging or loaded.
        options: ``preconditioner``, ``damping``, ``mode``, ``reduce`` where they differ from the run's config.
    """

    name: ClassVar[str] = "stored gradients"

    def __init__(self, run: Answering, **options: Any) -> None:
        self._run, self._options = run, options

    @property
    def data_id(self) -> Ids:
        """The stored samples, each once, in the store's order."""
        return np.asarray(self._self().data_id, dtype=object)

    def scores(self, queries: Any) -> Tensor:
        """``[queries, samples]``."""
        scores = self._run.compute_influence_all(queries, **self._options).scores
        assert scores is not None  # asked for without k
        return scores

    def self_influence(self) -> Tensor:
        """``[samples]``; the option ``mode`` plays no part."""
        return self._self().scores

    def _self(self) -> SelfInfluence:
        options = {name: value for name, value in self._options.items() if name not in ("mode", "engine")}
        return self._run.compute_self_influence(**options)
