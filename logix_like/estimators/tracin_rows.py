"""TracIn from the rows of a store: every step's own gradients, with no further pass over the data."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from logix_like.errors import ConfigError, QueryError, StoreError
from logix_like.estimators.base import Estimator
from logix_like.path import TrainingPath
from logix_like.query.gradients import QueryGradients
from logix_like.query.result import Ids
from logix_like.store import GradientStore
from logix_like.store.format.journal import journals
from logix_like.updates import Hyper, UpdateRule, common_settings, require_descent, rule_of


class Captured(Protocol):
    """What ``run.query`` and ``run.query_fn`` give."""

    @property
    def gradients(self) -> QueryGradients:
        """Of its queries."""
        ...


Asked = Captured | QueryGradients
AtSteps = Mapping[int, Asked]
"""The same queries' gradients at several moments, by the number of steps taken before."""


class TracInRP(Estimator):
    """``sum over visits of lr_t w_t  P g_q . P g_i(theta_t)``, from projected rows (Pruthi et al. 2020, section 3.4).

    A stored row is the sample's gradient *at the step that used it*, so that only the query's gradient is held
    between checkpoints: give it at one moment, or at several (each row then takes the latest one before its step). The
    weight ``w_t`` in the optimizer's gradient is that of the recorded path (``record: path``); without one it is taken
    as ``1 / rows of the step``, a mean over the batch. Under momentum a gradient counts with the sum of its effects.
    Where gradients are clipped, a step's scores are too large by that factor: rows are what came before.
    A store of an earlier version does not know its optimizer, which is then taken for SGD, with a warning.

    Sign: a positive score means that training on the sample lowered the query's loss (a proponent, helpful);
    negative, that it raised it (an opponent, harmful). A query is what ``run.query`` or ``run.query_fn`` captured.

    Raises:
        StoreError: rows carry no learning rate (``init(optimizer=...)`` records it), or there are none.
        StoreDamagedError: there is a recorded path, and it cannot be read.
        ConfigError: the optimizer is unknown (lists the known) or adaptive (its steps are no multiple of the
            gradient), or its parameter groups moved by different rates.
    """

    name: ClassVar[str] = "TracIn-RP"

    def __init__(self, store: GradientStore) -> None:
        self._store = store
        valid = store.valid
        if not valid.any():
            raise StoreError(f"{store.path} holds no row to answer from")
        if np.isnan(store.lr[valid]).any():
            raise StoreError("rows carry no learning rate, which TracIn weighs them by; log with init(optimizer=...)")
        # A dict keeps the order of first visits; ids of both types in one array would not compare.
        columns: dict[object, int] = {}
        self._column = np.array([columns.setdefault(i, len(columns)) if ok else -1 for i, ok in _pairs(store, valid)])
        self._ids = np.empty(len(columns), dtype=object)
        self._ids[:] = list(columns)
        self._weights = torch.from_numpy(np.where(valid, _rates(store), 0.0))

    @property
    def data_id(self) -> Ids:
        return self._ids

    def scores(self, queries: Asked | AtSteps) -> Tensor:
        """``[queries, samples]``."""
        at_steps = queries if isinstance(queries, Mapping) else {0: queries}
        given = {step: _gradients(asked) for step, asked in sorted(at_steps.items())}
        directions = self._directions(given)
        moments = list(given)
        place = np.array([max(bisect.bisect_right(moments, step) - 1, 0) for step in self._store.step.tolist()])
        scores = torch.zeros(directions.shape[1], len(self._ids), dtype=torch.float64)
        for chunk in self._store.chunks():
            rows = np.arange(chunk.start, chunk.start + len(chunk))
            decoded = chunk.decode()
            for moment in np.unique(place[rows]):
                own = rows[(place[rows] == moment) & (self._column[rows] >= 0)]
                part = directions[moment] @ decoded[own - chunk.start].to(directions).T
                scores.index_add_(1, torch.from_numpy(self._column[own]), part.double() * self._weights[own])
        return scores.float()

    def self_influence(self) -> Tensor:
        """``[samples]``: ``sum over visits of lr_t w_t |P g_i|^2``."""
        scores = torch.zeros(len(self._ids), dtype=torch.float64)
        own = np.flatnonzero(self._column >= 0)
        squares = torch.from_numpy(self._store.norm[own] ** 2)
        return scores.index_add_(0, torch.from_numpy(self._column[own]), squares * self._weights[own]).float()

    def _directions(self, given: Mapping[int, QueryGradients]) -> Tensor:
        """``[moments, queries, width]``."""
        if not given:
            raise QueryError("there is no query; give gradients at one moment at least")
        for query in given.values():
            query.require_answerable()
            self._store.modules.require_same(query.layout)
        names = {query.data_id for query in given.values()}
        if len(names) > 1:
            raise QueryError(
                "the queries of different moments have different ids; give the same ones in the same order"
            )
        return torch.stack([query.gradients.float() for query in given.values()])


def _gradients(asked: Asked) -> QueryGradients:
    return asked if isinstance(asked, QueryGradients) else asked.gradients


def _pairs(store: GradientStore, valid: np.ndarray) -> zip[tuple[object, bool]]:
    return zip(store.data_id.tolist(), valid.tolist(), strict=True)


def _rates(store: GradientStore) -> np.ndarray:
    """``[rows]``: what each row's gradient moved the weights by, per unit."""
    if journals(store.path):
        return _recorded_rates(store, store.training_path)
    # A step that was taken again after going back is another batch.
    attempts = np.repeat([w.attempt for w in store.writers], [w.rows for w in store.writers])
    batches = np.stack([attempts, store.step])
    _, inverse, counts = np.unique(batches, axis=1, return_inverse=True, return_counts=True)
    rates: np.ndarray = store.lr / counts[inverse.reshape(-1)] * _effect(store)
    return rates


def _effect(store: GradientStore) -> float:
    """How far a gradient moves the weights in the long run, in learning rates: more than 1 under momentum."""
    optimizer = store.manifest.optimizer
    if not optimizer:
        warnings.warn(
            "the store does not know which optimizer trained: it is taken for SGD without momentum, and scores of an "
            "adaptive one would be wrong",
            RuntimeWarning,
            stacklevel=4,
        )
        return 1.0
    rule = _linear_rule(optimizer["name"], optimizer["groups"])
    return rule.rate({**_common(optimizer["groups"]), "lr": 1.0})


def _linear_rule(optimizer: str, groups: Sequence[Hyper]) -> UpdateRule:
    require_descent(groups)
    rule = rule_of(optimizer)
    if rule.adaptive:
        raise ConfigError(
            f"the training used {optimizer}, whose steps are no multiple of the gradient, so that rows and "
            "learning rates do not tell them; use TracIn or TracInCP over the recorded path, or run.track"
        )
    return rule


def _common(groups: Sequence[Hyper]) -> Hyper:
    return common_settings(groups, "projected rows", "use TracIn or TracInCP over the recorded path")


def _recorded_rates(store: GradientStore, path: TrainingPath) -> np.ndarray:
    rule = _linear_rule(path.optimizer, path.settings(path.first))
    rate = {step.step: rule.rate(_common(step.settings)) for step in path.steps}
    weight = {(step.step, one): block.weight for step in path.steps for block in step.blocks for one in block.data_id}
    rows = zip(store.step.tolist(), store.data_id.tolist(), strict=True)
    return np.array([rate.get(step, 0.0) * weight.get((step, one), 0.0) for step, one in rows])
