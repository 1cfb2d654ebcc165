"""TracIn over checkpoints: the whole training set at some moments, in place of the batch of every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from logix_like.errors import ConfigError, StoreError
from logix_like.estimators.along import as_ids
from logix_like.estimators.base import Estimator
from logix_like.estimators.flat import DataOf, FlatModel, checked, require_chunk, require_queries
from logix_like.estimators.last_layer import LastLayer
from logix_like.estimators.movement import scale_at
from logix_like.objective import Batch, Objective
from logix_like.path import Checkpoint, StoredCheckpoint, TrainingPath
from logix_like.query.result import Ids
from logix_like.updates import require_descent, rule_of
from logix_like.weights import differentiable


class TracInCP(Estimator):
    """TracInCP (Pruthi et al. 2020, section 3.3): ``sum_k rate_k g_q(theta_k) . g_i(theta_k)`` over checkpoints.

    ``rate_k`` is the learning rate there; under Adam, AdamW or RMSprop it is the optimizer's own step size of each
    weight, from its recorded state (a checkpoint before its first step has none and is left out), and under momentum
    the sum of an impulse's effects. A checkpoint stands for the steps up to the next one, each of which holds a sample
    with the chance ``1 / steps of an epoch``, so that scores are in units of the query's loss: with a checkpoint at
    every step of full-batch training it is :class:`TracIn` without memory of earlier steps.

    Sign: a positive score means that training on the sample lowered the query's loss (a proponent, helpful);
    negative, that it raised it (an opponent, harmful). A query is a batch of data.

    Args:
        path: the recorded training, ``run.training_path``.
        model: the model that was trained.
        objective: what it was trained for.
        data: gives the batch of some ids.
        checkpoints: steps of the checkpoints to use; None for all but the last, behind which no step was taken.
        chunk: samples whose gradients are held together.

    Raises:
        StoreError: there is no checkpoint, not those asked for, or none with an adaptive optimizer's state.
        ModelMismatchError: the path was recorded with another model.
        ConfigError: the optimizer has no known update rule (lists the known).
    """

    name: ClassVar[str] = "TracInCP"

    def __init__(
        self,
        path: TrainingPath,
        model: nn.Module,
        objective: Objective,
        data: DataOf,
        *,
        checkpoints: Sequence[int] | None = None,
        chunk: int = 64,
    ) -> None:
        path.require_parameters({name: tuple(p.shape) for name, p in model.named_parameters()})
        self._flat = FlatModel(model, objective, path.parameters)
        self._data = checked(data)
        self._chunk = require_chunk(chunk)
        self._ids = path.data_id
        self._visits = visits_between(path, _chosen(path, checkpoints))
        self._rates = Rates(path, self._flat)

    @property
    def data_id(self) -> Ids:
        return as_ids(self._ids)

    def scores(self, queries: Batch) -> Tensor:
        """``[queries, samples]``."""
        total = None
        require_queries(queries)
        with differentiable(self._flat.model):
            for theta, rate, visits in self._each():
                wanted = self._flat.sample_gradients(theta, queries) * rate
                part = torch.cat([wanted @ rows.T for rows in self._rows(theta)], 1) * visits
                total = part if total is None else total + part
        assert total is not None
        return total

    def self_influence(self) -> Tensor:
        """``[samples]``."""
        total = torch.zeros(len(self._ids))
        with differentiable(self._flat.model):
            for theta, rate, visits in self._each():
                own = torch.cat([(rows * rate * rows).sum(1) for rows in self._rows(theta)])
                total = total.to(own) + own * visits
        return total

    def _each(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Weights, step sizes and visits at each checkpoint that counts."""
        known = False
        for stored, visits in self._visits:
            checkpoint = stored.read()
            rate = self._rates.at(checkpoint)
            if rate is not None:
                known = True
                yield self._flat.flatten(checkpoint.weights), rate, visits
        if not known:
            raise StoreError(
                f"the checkpoints of steps {', '.join(str(c.step) for c, _ in self._visits)} hold no state of the "
                "optimizer, which is adaptive and has no step size without one; set 'checkpoints' in the config, so "
                "that some are taken in the midst of the training"
            )

    def _rows(self, theta: Tensor) -> Iterable[Tensor]:
        for start in range(0, len(self._ids), self._chunk):
            yield self._flat.sample_gradients(theta, self._data(self._ids[start : start + self._chunk]))


class TracInLastLayer(Estimator):
    """TracInCPFast (Pruthi et al. 2020, appendix F): TracInCP of the last linear layer alone, by its factors.

    A sample's gradient there is ``e_i (x) a_i``, residual times input, so that a product of two gradients is
    ``(e_i . e_q)(a_i . a_q + 1)`` (the 1 for the bias) and none is ever formed. The learning rate is taken as one
    number: the ``lr`` of the parameter group that holds the layer (a step size for each weight would not factorise).
    Arguments as for :class:`TracInCP`, and ``layer``, the last layer's name (None: the last ``nn.Linear``).
    """

    name: ClassVar[str] = "TracInCPFast"

    def __init__(
        self,
        path: TrainingPath,
        model: nn.Module,
        objective: Objective,
        data: DataOf,
        *,
        layer: str | None = None,
        checkpoints: Sequence[int] | None = None,
        chunk: int = 256,
    ) -> None:
        path.require_parameters({name: tuple(p.shape) for name, p in model.named_parameters()})
        self._path = path
        require_descent(path.settings(path.first))
        self._layer = LastLayer(model, objective, layer)
        self._weight = f"{self._layer.name}.weight" if self._layer.name else "weight"
        if self._weight not in path.parameters:
            raise ConfigError(f"the path's optimizer did not train {self._weight!r}; name another layer")
        self._data = checked(data)
        self._chunk = require_chunk(chunk)
        self._ids = path.data_id
        self._visits = visits_between(path, _chosen(path, checkpoints))

    @property
    def data_id(self) -> Ids:
        return as_ids(self._ids)

    def scores(self, queries: Batch) -> Tensor:
        """``[queries, samples]``."""

        def part() -> Tensor:
            asked = self._layer.factors(require_queries(queries))
            return torch.cat([asked.products(self._layer.factors(batch)) for batch in self._batches()], 1)

        return self._summed(part)

    def self_influence(self) -> Tensor:
        """``[samples]``."""

        def part() -> Tensor:
            return torch.cat([self._layer.factors(batch).squares() for batch in self._batches()])

        return self._summed(part)

    def _summed(self, part: Callable[[], Tensor]) -> Tensor:
        total: Tensor | None = None
        for stored, visits in self._visits:
            lr = float(self._path.settings_for(self._weight, stored.step)["lr"])
            with self._layer.at(stored.read().weights):
                found = part() * (lr * visits)
            total = found if total is None else total + found
        assert total is not None
        return total

    def _batches(self) -> Iterable[Batch]:
        for start in range(0, len(self._ids), self._chunk):
            yield self._data(self._ids[start : start + self._chunk])


class Rates:
    """How far the optimizer moved each weight for a unit of gradient, at any checkpoint of a path."""

    def __init__(self, path: TrainingPath, flat: FlatModel) -> None:
        self._path = path
        self._flat = flat
        self._rule = rule_of(path.optimizer)
        require_descent(path.settings(path.first))

    def at(self, checkpoint: Checkpoint) -> Tensor | None:
        """``[parameters]``; the learning rate is that of the step behind the checkpoint.

        None where an adaptive optimizer has no state, as before its first step.
        """
        if self._rule.adaptive and not checkpoint.moments:
            return None
        own = self._flat.tensors(self._flat.theta)
        group_of = {name: number for number, group in enumerate(self._path.groups) for name in group}
        settings = self._path.settings(checkpoint.step)
        parts = []
        for name, value in own.items():
            hyper = settings[group_of[name]]
            rate = self._rule.rate(hyper) * scale_at(self._rule, checkpoint, name, hyper)
            parts.append((torch.ones_like(value) * rate).reshape(-1))
        return torch.cat(parts)


def visits_between(path: TrainingPath, chosen: Sequence[StoredCheckpoint]) -> list[tuple[StoredCheckpoint, float]]:
    """Each checkpoint with the sum of its steps' weights of one sample, averaged over the samples."""
    ends = [c.step for c in chosen[1:]] + [path.end]
    samples = len(path.data_id)
    parts = []
    for checkpoint, end in zip(chosen, ends, strict=True):
        blocks = [block for step in path.between(checkpoint.step, end).steps for block in step.blocks]
        parts.append((checkpoint, sum(block.weight * len(block.data_id) for block in blocks) / samples))
    return parts


def _chosen(path: TrainingPath, steps: Sequence[int] | None) -> list[StoredCheckpoint]:
    known = [c for c in path.checkpoints if path.first <= c.step < path.end]
    listed = ", ".join(str(c.step) for c in known) or "none"
    if steps is None:
        chosen = known
    else:
        chosen = [c for c in known if c.step in steps]
        missing = sorted(set(steps) - {c.step for c in known})
        if missing:
            raise StoreError(f"the path has no checkpoint of step {missing[0]}; there are those of steps {listed}")
    if not chosen:
        raise StoreError("the path has no checkpoint before its last step; set 'checkpoints' in the config")
    return chosen
