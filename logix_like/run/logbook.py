"""From the blocks of a training loop to batches of rows on their way to the store."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from logix_like.capture.batch import FactorMoments, ProjectedBatch
from logix_like.capture.tracker import Recording, Tracker
from logix_like.config import Config
from logix_like.curvature.stream import CurvatureStream, Look
from logix_like.errors import CaptureError
from logix_like.query.gradients import QueryGradients
from logix_like.ranks import Ranks
from logix_like.run.block import Block, BlockOptions
from logix_like.run.delivery import Delivery, Streams
from logix_like.run.overflow import StepGate, overflowed
from logix_like.run.session import StoreSession
from logix_like.run.tracking import compare_with_gradients, stored_projections, warn_of_coupling
from logix_like.steps import Progress
from logix_like.timing import Stopwatch, Timing

UNSTORED = (
    "this run was finalized or loaded for queries: blocks are kept for get_log() only, and nothing is stored; to log "
    "further samples, start with logix.init(..., resume=True)"
)


@dataclass(frozen=True)
class _Ended:
    """A block that is over and not projected yet."""

    recording: Recording
    options: BlockOptions
    columns: ProjectedBatch | None
    """What is stored beside its rows; None when nothing is."""
    overflow: Tensor | None
    """Whether its gradients overflowed, ``[]``; None where no step can be skipped."""

    @property
    def trained(self) -> bool:
        """Whether its step is taken, as far as is known."""
        return self.overflow is None or not bool(self.overflow)


class Logbook:
    """Opens blocks one at a time and hands their rows, once they are projected, to the session.

    During a projection's warm-up ended blocks wait un-projected, in order, until there are samples enough.
    """

    def __init__(self, config: Config, session: StoreSession | None, progress: Progress) -> None:
        self._config = config
        self._session = session
        self._progress = progress
        self._tracker: Tracker | None = None
        self._open: Block | None = None
        self._gate = StepGate(self._store)
        if session is not None:
            session.release = self._release
        self._streams = Streams()
        self._waiting: list[_Ended] = []
        self._last: QueryGradients | None = None
        self._compared: Recording | None = None
        self._watch = Stopwatch()
        self._untold = Timing()
        self.statistics: frozenset[str] = frozenset(config.statistics) - {"curvature"}
        """What is gathered of the rows; fixed by the first batch."""
        self.curvature: CurvatureStream | None = None
        """Gathers the curvature at full size, if that is asked for."""
        self.saving = True
        """Whether blocks are stored."""
        self.closed = session is None
        """Whether logging has ended; blocks are then captured for :attr:`last` only."""
        self._unread = 0
        """Blocks that were neither stored nor asked for, since logging had ended."""
        self.blocks = 0
        """Blocks that have ended."""
        self.on_block: Callable[[BlockOptions, bool], None] | None = None
        """Told of each block of the training, stored or not, and whether its step will be skipped."""
        self.on_rows: Callable[[ProjectedBatch], None] | None = None
        """Told of each batch of rows, once it is known whether its step will be skipped."""

    @property
    def tracker(self) -> Tracker:
        """The watched model's tracker.

        Raises:
            CaptureError: no model is watched.
        """
        if self._tracker is None:
            raise CaptureError("no model is watched: give init(model=...) or call run.watch(model) first")
        return self._tracker

    @tracker.setter
    def tracker(self, tracker: Tracker) -> None:
        self._tracker = tracker

    @property
    def watching(self) -> bool:
        """Whether a model is watched."""
        return self._tracker is not None

    @property
    def waiting(self) -> bool:
        """Whether ended blocks wait for the projection's warm-up."""
        return bool(self._waiting)

    @property
    def last(self) -> QueryGradients:
        """Ids and rows of the last block that was projected.

        Raises:
            CaptureError: there is none.
        """
        if self._last is None:
            raise CaptureError("there is no log yet: run a block first" + self.warmup_note())
        self._unread = 0
        # A copy: the rows themselves may still be on their way to the store.
        return replace(self._last, gradients=self._last.gradients.clone())

    @property
    def timing(self) -> Timing:
        """What the training took so far, from its second block on, and logging of it."""
        return self._watch.total

    def options(self, data_id: Any, *, loss_reduction: str | None = None, **given: Any) -> BlockOptions:
        """What a block is told, with the config's defaults."""
        return BlockOptions.of(
            data_id,
            reduction=loss_reduction or self._config.loss_reduction,
            per_token=self._config.per_token,
            **given,
        )

    def open(self, options: BlockOptions, *, detached: bool = False) -> Block:
        """A new block, open once it is entered; ``detached`` when the model's weights are frozen.

        Raises:
            CaptureError: no model is watched.
        """
        tracker = self.tracker
        recording = look = None
        if not self._storing or self.blocks % self._config.every == 0:
            recording = tracker.recording(
                len(options.data_id),
                mask=options.mask,
                moments=self._storing and "kronecker" in self.statistics,
                detached=detached,
                watch=self._watch,
            )
            if self._storing and self.curvature is not None:
                look = self.curvature.look(len(options.data_id), options.mask, detached=detached, watch=self._watch)
        ended = partial(self._ended, detached=detached)
        return Block(recording, look, options, self._begin, ended, self._dropped, self._watch)

    def end(self) -> None:
        """Close the open block.

        Raises:
            CaptureError: none is open, or no gradient reached a tracked module.
        """
        if self._open is None:
            raise CaptureError("end() without start(): no block is open")
        self._open.__exit__(None, None, None)

    def abort(self) -> bool:
        """Drop the open block; whether there was one."""
        block = self._open
        if block is not None:
            block.drop()
        return block is not None

    def require_no_block(self, what: str) -> None:
        """Raise :class:`CaptureError` if a block is open."""
        if self._open is not None:
            raise CaptureError(
                f"a block is open already: {what}; close it with end() (or leave its with statement), or drop it with "
                "run.abort()"
            )

    def flush(self, *, force: bool = False) -> None:
        """Turn ended blocks into rows, if the projections exist; ``force`` ends a warm-up early."""
        self._project_waiting(force)
        if force:
            self._gate.release()

    def _release(self) -> None:
        if not self.closed:
            self.flush(force=True)

    def settle(self) -> None:
        """Hand over the rows that were held back, unless a scaler may still skip their step."""
        self._gate.settle(self._progress.step)

    def keep_curvature(self) -> None:
        """Write what was gathered of the curvature so far."""
        if self._session is not None and self.curvature is not None:
            self._session.keep(self.curvature.save)

    def keep_due_curvature(self) -> None:
        """The same, if nothing of it was written yet or the last time is long enough ago."""
        if self.curvature is not None and (self.curvature.due or not self.curvature.written):
            self.keep_curvature()

    @property
    def holds(self) -> bool:
        """Whether rows are held back, since a scaler may still skip their step."""
        return self._gate.holds

    def _project_waiting(self, force: bool) -> None:
        if self._tracker is None or not self._waiting:
            return
        if self._tracker.needs_warmup:
            samples = sum(len(ended.options.data_id) for ended in self._waiting)
            if not force and samples < self._config.projection.warmup:
                return
            self._tracker.fit(ended.recording for ended in self._waiting if ended.trained)
        waiting, self._waiting = self._waiting, []
        for ended in waiting:
            rows, moments = ended.recording.project()
            if ended.recording is self._compared:
                compare_with_gradients(ended.recording, rows, self._tracker)
            rows = per_token(rows, ended.options)
            self._last = QueryGradients(ended.options.data_id, rows, self._tracker.settle())
            if ended.columns is not None:
                self._send(ended.columns, rows, moments, ended.overflow)

    def _send(
        self, columns: ProjectedBatch, rows: Tensor, moments: FactorMoments | None, overflow: Tensor | None
    ) -> None:
        delivery = Delivery(self._streams)
        batch = replace(
            columns,
            rows=delivery.take(rows),
            loss=None if columns.loss is None else delivery.take(columns.loss),
            moments=None if moments is None else moments.moved(delivery.take),
            arrival=delivery,
        )
        flag = None if overflow is None else delivery.take(overflow)
        delivery.sent()
        self._gate.put(batch, flag)

    def warmup_note(self) -> str:
        """What to wait for, when the projections do not exist yet."""
        if self._tracker is None or not self._tracker.needs_warmup:
            return ""
        settings = self._config.projection
        return f" (projection.init {settings.init!r} is made from the first {settings.warmup} samples; log them first)"

    @property
    def _storing(self) -> bool:
        return self.saving and not self.closed

    def _begin(self, block: Block) -> None:
        self.require_no_block("blocks are not nested")
        self._open = block
        if self._storing:
            self._untold += self._watch.lap()

    def _dropped(self, block: Block) -> None:
        if self._open is block:
            self._open = None

    def _ended(self, block: Block, *, detached: bool) -> None:
        if block.recording is not None and self.blocks == 0 and not self.closed:
            warn_of_coupling(block.recording, self.tracker.model)
            # Not behind a warm-up, when training has gone on, nor where gradients are averaged over processes.
            if not self.tracker.needs_warmup and Ranks.here().size == 1:
                self._compared = block.recording
        wanted = self._storing and (block.recording is not None or self.on_block is not None)
        overflow = overflowed(self.tracker.model, block.options.scaler) if wanted else None
        if block.recording is not None:
            self._waiting.append(_Ended(block.recording, block.options, self._columns(block.options), overflow))
            self.flush()
            if block.look is not None:
                self._look_at(block.look, block.recording.factor)
        self.blocks += 1
        if self.closed:
            self._unread += 1
            if self._unread == 2:
                warnings.warn(UNSTORED, RuntimeWarning, stacklevel=4)
        if self.on_block is not None and self._storing and not detached:
            self.on_block(block.options, overflow is not None and bool(overflow))
        if not self.closed:
            self._progress.block_ended()

    def _look_at(self, look: Look, factor: float | Tensor) -> None:
        assert self.curvature is not None
        self.curvature.take(look, factor)
        if self.curvature.due:
            self.keep_curvature()

    def _columns(self, options: BlockOptions) -> ProjectedBatch | None:
        """What is stored beside the rows, as it is now; None when nothing is stored."""
        if not self._storing:
            return None
        timing, self._untold = self._untold, Timing()
        return ProjectedBatch(
            data_id=options.data_id,
            rows=torch.empty(0),
            step=self._progress.step,
            epoch=self._progress.epoch,
            lr=self._progress.lr,
            loss=None if options.loss is None else options.loss.to(torch.float32, copy=True),  # a loop may reuse it
            metadata=options.metadata,
            weight=1 / options.factor(options.scale),
            timing=timing,
        )

    def _store(self, batch: ProjectedBatch) -> None:
        assert self._session is not None
        tracker = self.tracker
        if not self._session.begun:
            projections = stored_projections(tracker)
            self._session.begin(tracker.settle(), projections, self.statistics, self._progress.optimizer)
        self._session.put(batch)
        if self.on_rows is not None:
            batch.wait()
            self.on_rows(batch)


def per_token(rows: Tensor, options: BlockOptions) -> Tensor:
    """``rows [batch, width]``, divided by each sample's number of tokens if the block was told so."""
    divisors = options.row_divisors()
    return rows if divisors is None else rows / divisors.to(rows)
