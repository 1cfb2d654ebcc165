"""Scores of training samples for some queries, added up while training: TracIn and in-run Shapley in no second pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from logix_like.capture.batch import ProjectedBatch
from logix_like.capture.tracker import Tracker, gradient_matrices
from logix_like.errors import CaptureError, ConfigError
from logix_like.estimators.flat import sliced
from logix_like.layout import DataId
from logix_like.query.result import InfluenceResult
from logix_like.ranks import Ranks
from logix_like.run.block import BlockOptions
from logix_like.run.tracking import projected
from logix_like.steps import counted
from logix_like.updates import Hyper, UpdateRule, common_settings, rule_of, settings_of
from logix_like.weights import evaluating, frozen, undisturbed

FORGOTTEN = 1e-3
"""A gradient is dropped once momentum has left so little of it, relative to its first effect."""

LossFn = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch)``: the batch's loss, reduced as the config says."""


@dataclass(frozen=True, eq=False)
class _Visits:
    """Rows whose effect on the weights goes on."""

    columns: Tensor
    """``[batch]``: which samples."""
    rows: Tensor
    """``[batch, width]``, times their weight in the optimizer's gradient."""
    step: int
    """At which step the optimizer saw them."""
    settings: Hyper
    """Settings of the first parameter group then."""


class LiveScores:
    """What ``run.track(queries)`` gives: scores ``[queries, samples]`` that grow with the training.

    Every ``every`` steps the queries' gradients are taken anew; between two of these, a sample's share of each
    update is scored against their mean (``order=2``, in-run Shapley's second order by the trapezoid rule) or against
    the earlier one (``order=1``, TracIn). Momentum, and each weight's step size under Adam, AdamW and RMSprop, are
    the optimizer's own. Shares are those of the projected gradients: inner products are unbiased estimates.

    Sign: a positive score means that training on the sample lowered the query's loss (a proponent, helpful);
    negative, that it raised it (an opponent, harmful). Over all samples scores add up to the fall of the query's loss
    through the tracked modules. Under a gradient scaler a step is seen one step late. What happens to a gradient
    between block and step is not seen: where it is clipped, the step's scores are too large by the factor of clipping.

    Args:
        tracker, optimizer: of the run.
        batch, loss_fn, options: the queries, as :meth:`logix_like.Run.track` takes them.
        every: steps between two turns of the queries' gradients.
        order: 1 or 2.
        step: how many steps the run has counted so far; the optimizer may have taken others before.

    Raises:
        ConfigError: the optimizer has no known update rule (lists the known), or an option makes no sense.
    """

    def __init__(
        self,
        tracker: Tracker,
        optimizer: Optimizer,
        batch: Any,
        loss_fn: LossFn,
        options: BlockOptions,
        *,
        every: int = 20,
        order: int = 2,
        step: int = 0,
    ) -> None:
        if counted(every, "every, the steps between two turns,") < 1 or order not in (1, 2):
            raise ConfigError(
                f"every is {every} and order {order!r}; give a number of steps, 1 or more, and order 1 or 2"
            )
        if options.per_token:
            raise ConfigError("queries are tracked with the samples' whole losses; set per_token: false")
        if Ranks.here().size > 1:
            raise ConfigError("queries are tracked in one process; with several each sees a part of every batch")
        self.query_id = options.data_id
        """One id for each query."""
        self._tracker = tracker
        self._optimizer = optimizer
        self._rule: UpdateRule = rule_of(type(optimizer).__name__)
        self._rule.check(_common_settings(optimizer))
        self._batch = batch
        self._loss_fn = loss_fn
        self._options = options
        self._every = every
        self._order = order
        self._columns: dict[DataId, int] = {}
        self._scores = torch.zeros(len(self.query_id), 0)
        self._visits: deque[_Visits] = deque()
        self._gradients: Tensor | None = None
        self._since = 0
        self._before = _steps_taken(optimizer) - step
        self._settings: dict[int, Hyper] = {}

    def add(self, batch: ProjectedBatch) -> None:
        """Take a batch of rows at the step whose weights the model has now."""
        if batch.overflow:
            return
        if self._gradients is None or batch.step - self._since >= self._every:
            self._turn(batch.step)
        settings = _common_settings(self._optimizer)
        self._settings[batch.step] = settings
        columns = [self._columns.setdefault(one, len(self._columns)) for one in batch.data_id]
        self._visits.append(_Visits(torch.tensor(columns), batch.rows * batch.weight, batch.step, settings))

    def finish(self, steps: int) -> None:
        """Score what has come since the last turn; ``steps`` were taken in all."""
        if self._gradients is not None and self._settings:
            self._turn(steps)

    @property
    def data_id(self) -> tuple[DataId, ...]:
        """The samples, in the order of their first visit."""
        return tuple(self._columns)

    @property
    def scores(self) -> Tensor:
        """``[queries, samples]``, as of the last turn; complete after ``run.finalize()``."""
        return self._scores[:, : len(self._columns)].clone()

    def result(self) -> InfluenceResult:
        """The scores as a result with rankings, tables and files."""
        ids = np.empty(len(self._columns), dtype=object)
        ids[:] = list(self._columns)
        name = "TracIn" if self._order == 1 else "in-run Shapley"
        self._grow()
        return InfluenceResult(
            query_id=self.query_id,
            samples=len(ids),
            mode="dot",
            preconditioner=name,
            damping=0.0,
            reduce="sum",
            engine="live",
            note=f"{name} while training; query gradients taken every {self._every} steps",
            data_id=ids,
            scores=self.scores,
        )

    def _turn(self, step: int) -> None:
        """The queries' gradients now; what lies between the last turn and this is scored."""
        before, after = self._gradients, self._query_gradients()
        if after is not None and self._visits:
            # An adaptive optimizer has no scale before its first step, which is then given that of the second.
            earlier = after if before is None else before
            self._score(earlier if self._order == 1 else (earlier + after) / 2, step)
        self._gradients, self._since = after, step

    def _score(self, directions: Tensor, end: int) -> None:
        self._grow()
        for visits in self._visits:
            factor = sum(
                self._rule.impulse(step - visits.step, step + self._before, settings)
                for step, settings in self._settings.items()
                if visits.step <= step < end
            )
            self._scores.index_add_(1, visits.columns, factor * (directions @ visits.rows.to(directions).T))
        self._settings.clear()
        while self._visits and self._is_spent(self._visits[0], end):
            self._visits.popleft()

    def _is_spent(self, visits: _Visits, step: int) -> bool:
        # Whatever the learning rate was: after a step of rate 0 momentum moves the weights all the same.
        unit = {**visits.settings, "lr": 1.0}
        taken = step + self._before
        return self._rule.impulse(step - visits.step, taken, unit) <= FORGOTTEN * self._rule.impulse(0, taken, unit)

    def _grow(self) -> None:
        missing = len(self._columns) - self._scores.shape[1]
        if missing > 0:
            more = self._scores.new_zeros(len(self.query_id), max(missing, self._scores.shape[1]))
            self._scores = torch.cat([self._scores, more], 1)

    def _query_gradients(self) -> Tensor | None:
        """``[queries, width]`` at the model's present weights, each weight's part times the optimizer's scale.

        None while an adaptive optimizer has none.
        """
        model = self._tracker.model
        if self._rule.adaptive and not self._optimizer.state:
            return None
        with undisturbed(model), torch.enable_grad():
            if self._rule.adaptive:
                return torch.cat([self._scaled(model, n, one) for n, one in enumerate(sliced(self._batch, 1))])
            with frozen(model):
                recording = self._tracker.recording(len(self.query_id), detached=True)
                with recording:
                    self._loss_fn(model, self._batch).backward()
                recording.check()
                recording.factor = self._options.factor(1.0)
                return recording.project()[0].float().cpu()

    def _scaled(self, model: nn.Module, number: int, one: Any) -> Tensor:
        """``[1, width]``: the gradient of one query, weight by weight times the optimizer's scale, then projected."""
        with evaluating(model):
            (self._loss_fn(model, one) * self._options.of_one(number)).backward()
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._optimizer.state.get(parameter)
                    scale = self._rule.scale(state, int(state["step"]), group) if state else None
                    parameter.grad = torch.zeros_like(parameter) if scale is None else parameter.grad * scale
        blocks = projected(gradient_matrices(self._tracker.selection), torch.empty(0), self._tracker)
        for parameter in model.parameters():
            parameter.grad = None
        if set(blocks) != set(self._tracker.layout.names):
            raise CaptureError(
                "a tracked module shares its weight in a way that tracked queries do not know; exclude it"
            )
        return torch.cat([blocks[name].reshape(1, -1) for name in self._tracker.layout.names], 1).float().cpu()


def _steps_taken(optimizer: Optimizer) -> int:
    """How many steps the optimizer itself has counted, also before the run; 0 for one that does not count."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def _common_settings(optimizer: Optimizer) -> Hyper:
    instead = "use TracIn over a recorded path (record: path)"
    return common_settings(settings_of(optimizer), "tracked queries", instead)
