"""The object that a training loop talks to.

Sign convention, here as everywhere: a positive score means that training on the sample lowered the query's loss
(a proponent, helpful); negative, that it raised it (an opponent, harmful).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from logix_like.capture.batch import ProjectedBatch
from logix_like.capture.tracker import Tracker
from logix_like.config import Config, is_due
from logix_like.curvature import Curvature
from logix_like.errors import CaptureError, ConfigError, StoreError
from logix_like.ids import as_stored_ids
from logix_like.objective import Objective
from logix_like.path import Checkpoint, TrainingPath
from logix_like.query.gradients import QueryGradients
from logix_like.ranks import Ranks
from logix_like.run.asking import Asker
from logix_like.run.block import Block
from logix_like.run.curvatures import fitted_curvature, gathered_curvature, kept_curvature
from logix_like.run.extraction import batch_ids, progress_over
from logix_like.run.live import LiveScores
from logix_like.run.logbook import Logbook
from logix_like.run.logtypes import statistics_from_setup
from logix_like.run.questions import Questions
from logix_like.run.recording import PathRecorder
from logix_like.run.resuming import require_no_step_twice, stand_of
from logix_like.run.session import StoreSession
from logix_like.run.tracking import describe, new_tracker, require_training, tracker_of_store
from logix_like.steps import Progress, counted
from logix_like.store import GradientStore, OnDamage, Place, open_store
from logix_like.timing import Timing
from logix_like.weights import frozen


class Run(Questions):
    """Logs the gradients of training samples, and answers queries about them.

    Made by :func:`~logix_like.init` (logging) or :func:`~logix_like.load` (queries only). A run composes a
    :class:`StoreSession` (writing), a :class:`Logbook` (blocks) and an :class:`Asker` (queries), and owns their
    lifetimes.
    """

    def __init__(
        self,
        config: Config,
        path: Place,
        session: StoreSession | None,
        *,
        optimizer: Optimizer | None = None,
        verbose: bool = True,
        on_damage: OnDamage = "raise",
    ) -> None:
        self.config = config
        self.path = path
        self._session = session
        self._verbose = verbose
        self._progress = Progress(optimizer, **stand_of(session))
        self._progress.on_step = self._stepped
        self._logbook = Logbook(config, session, self._progress)
        self._on_damage = on_damage
        self._asker = Asker(path, config.query, self._logbook, on_damage)
        self._recorder: PathRecorder | None = None
        self._live: list[LiveScores] = []
        self._dropped = False

    # What is tracked

    def watch(self, model: nn.Module) -> None:
        """Track ``model``'s modules; calling it again with the same model does nothing.

        Raises:
            CaptureError: another model is being watched already.
            ConfigError: the optimizer that was given trains another model.
            ModelMismatchError: the store was made with another model.
            UnsupportedModuleError: a module chosen by name has no rule.
        """
        if self._logbook.watching:
            if self._logbook.tracker.model is not model:
                raise CaptureError("this run watches another model already; one run logs one model")
            return
        require_training(self._progress.optimizer, model)
        store = self.store if self._session is None else self._session.resumed
        if store is not None and store.layout is not None:
            self.follow(tracker_of_store(model, self.config, store))
        else:
            self.follow(new_tracker(model, self.config))

    def follow(self, tracker: Tracker) -> None:
        """Track what ``tracker`` says, made for this run's config; :meth:`watch` is this with a tracker of its own."""
        model = tracker.model
        self._logbook.tracker = tracker
        optimizer = self._progress.optimizer
        if self.config.record == "path" and self._session is not None and optimizer is not None:
            self._recorder = PathRecorder(self._session, model, optimizer, self._progress, self.checkpoint)
            self._logbook.on_block = self._recorder.block
        if self._session is not None and Ranks.here().first:
            self._logbook.curvature = gathered_curvature(
                self.path, tracker, "curvature" in self.config.statistics, resumed=self._session.resumed is not None
            )
        if self._verbose:
            tqdm.write(describe(tracker, self.config), file=sys.stderr)  # leaves a trainer's progress bar whole

    def setup(self, log_types: Mapping[str, Sequence[str]]) -> None:
        """Choose what is gathered, in LogIX's words: ``{"grad": ["log", "covariance"]}``.

        ``grad`` takes ``log`` (rows are stored in any case), ``mean``, ``variance``, ``covariance`` and
        ``corrected_eigval``; ``forward`` and ``backward`` take ``covariance`` (together the Kronecker factors).

        Raises:
            ConfigError: an unknown name (lists the known), or rows were logged already.
        """
        if self._logbook.blocks or self._logbook.closed:
            raise ConfigError("setup() must be called before the first batch is logged")
        self._logbook.statistics = statistics_from_setup(log_types)

    def save(self, enabled: bool = True) -> None:
        """Whether blocks are stored (the default) or only kept for :meth:`get_log`."""
        self._logbook.saving = enabled

    # Blocks of the training loop

    def __call__(
        self,
        data_id: Any,
        mask: Tensor | None = None,
        scale: float = 1.0,
        scaler: Any = None,
        loss_reduction: str | None = None,
        loss: Tensor | None = None,
        metadata: Mapping[str, Sequence[Any]] | None = None,
    ) -> Block:
        """A context manager around the forward and backward pass of one batch.

        Args:
            data_id: one ``str`` or ``int`` for each sample; or token ids ``[batch, positions]``, hashed row by row.
            mask: ``[batch, positions]``, true where a position counts (statistics, token means, hashes).
            scale: what the loop multiplied its loss by, e.g. 1 / accumulated batches.
            scaler: the ``torch.amp.GradScaler`` in use.
            loss_reduction: ``mean``, ``sum`` or ``token_mean`` where it differs from the config's.
            loss: per-sample losses ``[batch]``, stored beside the rows.
            metadata: further columns, one value for each sample.

        Raises:
            CaptureError: at the end of the block, if no gradient reached a tracked module.
        """
        options = self._logbook.options(
            data_id,
            mask=mask,
            scale=scale,
            scaler=scaler,
            loss_reduction=loss_reduction,
            loss=loss,
            metadata=metadata,
        )
        return self._logbook.open(options)

    def start(self, data_id: Any, mask: Tensor | None = None, **options: Any) -> None:
        """Open a block, as ``with run(data_id=...)`` does; :meth:`end` closes it."""
        self(data_id, mask, **options).__enter__()

    def end(self) -> None:
        """Close the block that :meth:`start` opened.

        Raises:
            CaptureError: none is open, or no gradient reached a tracked module.
        """
        self._logbook.end()

    def abort(self) -> None:
        """Drop the open block without rows, e.g. after an exception between :meth:`start` and :meth:`end`."""
        self._logbook.abort()

    def epoch(self, number: int) -> None:
        """Say that epoch ``number`` begins.

        With ``checkpoints: every_epoch`` the weights are kept, those that the last epoch ended with.
        """
        number, last = counted(number, "the epoch"), self._progress.epoch
        if last not in (-1, number) and self.config.checkpoints == "every_epoch":
            self.checkpoint()
        self._progress.epoch = number

    def step(self, number: int | None = None) -> int:
        """How many optimizer steps were taken so far; ``number`` says it, when training goes on from a checkpoint.

        Raises:
            ConfigError: ``number`` lies behind rows that count already, so that its steps would count twice.
        """
        if number is not None:
            number = counted(number, "the step")
            if self._session is not None:
                require_no_step_twice(self._session, self._progress.step, number, logged=self._logbook.blocks > 0)
            self._progress.step = number
        return self._progress.step

    def track(
        self,
        batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        *,
        data_id: Any = None,
        mask: Tensor | None = None,
        every: int = 20,
        order: int = 2,
    ) -> LiveScores:
        """Score every sample for a batch of queries while training goes on: TracIn (``order=1``) or in-run Shapley (2).

        Their gradients are taken every ``every`` steps; ``loss_fn`` and ``data_id`` as in :meth:`query_fn`.

        Raises:
            ConfigError: no optimizer was given, or it has no known update rule (lists the known).
        """
        optimizer = self._progress.optimizer
        if optimizer is None or self._logbook.closed or self.config.every != 1:
            raise ConfigError("queries are tracked while every block is logged; give init(optimizer=..., every=1)")
        options = self._logbook.options(batch_ids(batch, 0) if data_id is None else data_id, mask=mask)
        step, tracker = self._progress.step, self._logbook.tracker
        live = LiveScores(tracker, optimizer, batch, loss_fn, options, every=every, order=order, step=step)
        self._live.append(live)
        self._logbook.on_rows = self._followed
        return live

    def get_log(self) -> QueryGradients:
        """Rows of the last block: ids and projected gradients, usable as a query.

        Raises:
            CaptureError: no block has ended yet, or its rows wait for the projection's warm-up.
        """
        return self._logbook.last

    def extract(
        self,
        loader: Iterable[Any],
        loss_fn: Callable[[nn.Module, Any], Tensor],
        *,
        data_id: Callable[[Any], Any] | None = None,
        mask: Callable[[Any], Tensor] | None = None,
        progress: bool = True,
    ) -> None:
        """Log one pass over ``loader`` at the present weights, without training.

        For its duration weights are frozen (no weight gradient is computed) and the model is in eval mode; both
        are restored. Ids are running numbers 0, 1, ... unless ``data_id`` takes them from a batch.

        Args:
            loader: yields batches in a fixed order.
            loss_fn: ``loss_fn(model, batch)`` returns the batch's loss, reduced as the config says.
            data_id: ids of a batch.
            mask: mask of a batch, as in :meth:`__call__`.
            progress: whether a bar is shown.
        """
        if self._logbook.closed:
            raise StoreError("this run is finished or was loaded for queries: a pass over data would store nothing")
        model = self._logbook.tracker.model
        batches = progress_over(loader, progress, self.path.name, running_ids=data_id is None)
        with frozen(model), torch.enable_grad():
            for number, batch in batches:
                ids = batch_ids(batch, number) if data_id is None else data_id(batch)
                options = self._logbook.options(ids, mask=None if mask is None else mask(batch))
                with self._logbook.open(options, detached=True):
                    loss_fn(model, batch).backward()

    # What is kept

    def commit(self) -> None:
        """Everything logged so far is durable when this returns.

        The curvature that is gathered in training, which may be gigabytes, is written every few minutes at most.

        During a projection's warm-up there are no rows yet: the blocks wait in memory. So do those of an optimizer
        step that is still being accumulated under a gradient scaler, which may skip it.
        """
        if self._session is not None and not self._logbook.closed:
            self._logbook.settle()
            self._session.commit()
            self._logbook.keep_due_curvature()

    def checkpoint(self) -> None:
        """Keep the model's weights in the store (safetensors)."""
        if self._session is None or self._logbook.closed:
            raise StoreError("this run is finished or was loaded for queries: it keeps no further checkpoints")
        moments = None if self._recorder is None else self._recorder.moments()
        self._session.checkpoint(self._logbook.tracker.model, self._progress.step, self._progress.epoch, moments)

    def forget(self, data_id: Any) -> int:
        """Take back every row logged so far of the samples ``data_id``; returns how many there were.

        They count no more from here on, in scores, statistics or sample views, and are dropped from the disk when
        the store is compacted. Only Kronecker factors, sums over activations, and the curvature that is gathered in
        training hold what they added. Rows that are logged later count. Works after :meth:`finalize` too. Of several
        processes one calls it, after :meth:`commit` in all.

        Raises:
            StoreError: the run was loaded for queries, blocks wait for a projection's warm-up or for an optimizer step
                that a gradient scaler may skip, or a sample has no row.
        """
        if self._session is None:
            raise StoreError("a run that was loaded for queries changes nothing; use init(..., resume=True) to forget")
        if self._logbook.waiting:
            raise StoreError("samples cannot be forgotten while blocks wait" + self._logbook.warmup_note())
        self.commit()
        if self._logbook.holds:
            raise StoreError(
                "samples cannot be forgotten in the midst of an optimizer step that a gradient scaler may skip; forget "
                "them behind optimizer.step()"
            )
        return self._session.forget(as_stored_ids(data_id))

    def finalize(self) -> None:
        """End logging: commit, write statistics, build the sample view. Calling it again does nothing.

        Unless it has failed: then what was lost is said again, or what is left to do is tried once more.
        Afterwards blocks are captured for :meth:`get_log` but not stored, and queries go on working.
        """
        if self._session is None or self._session.finished:
            return
        if not self._logbook.closed:
            self._dropped = self._logbook.abort()
            self._progress.close()
            self._logbook.flush(force=True)
            for live in self._live:
                live.finish(self._progress.step)
            if self._logbook.watching and (self.config.checkpoints != "none" or self.config.record == "path"):
                self.checkpoint()
            self._logbook.keep_curvature()
            self._logbook.closed = True
        self._session.finish(self._logbook.tracker.model if self._logbook.watching else None)
        if self._dropped:
            warnings.warn(
                "a block was still open when the run was finalized: its rows are not stored; call run.end() first",
                RuntimeWarning,
                stacklevel=2,
            )
        if self.config.checkpoints == "every_epoch" and self._progress.epoch == -1 and self._logbook.blocks:
            warnings.warn(
                "checkpoints: every_epoch, but no epoch was ever told: only the weights at the end are kept; call "
                "run.epoch(number) at the start of each epoch",
                RuntimeWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        state = "for queries" if self._session is None else "finalized" if self._logbook.closed else "logging"
        return f"Run({str(self.path)!r}, {state}, {self.rows:,} rows logged here)"

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None or Ranks.here().size == 1:
            self.finalize()
        else:  # finalize waits for all processes, and those that go on may never come to it
            self.abort()
            self.commit()

    @property
    def store(self) -> GradientStore:
        """The store, read-only, with everything committed so far."""
        return open_store(self.path, on_damage=self._on_damage)

    @property
    def rows(self) -> int:
        """Rows that this process has handed to the store so far, committed or on their way."""
        return 0 if self._session is None else self._session.rows

    @property
    def timing(self) -> Timing:
        """What this process's training took so far, from its second block on, and logging of it."""
        return self._logbook.timing

    @property
    def training_path(self) -> TrainingPath:
        """What each optimizer step used, for replaying the training; recorded with ``record: path``.

        Raises:
            StoreError: it was not recorded.
        """
        return self.store.training_path

    def at(self, checkpoint: int) -> Checkpoint:
        """The weights and, with ``record: path``, the optimizer's state at a checkpoint, by its number (from 1).

        Raises:
            StoreNotFoundError: there is no such checkpoint (lists those that there are).
        """
        return self.store.checkpoint(checkpoint)

    @property
    def resumed_at(self) -> tuple[int, int] | None:
        """``(epoch, step)`` of the last committed row of the run that was resumed; None where there is none.

        The epoch is -1 if :meth:`epoch` was never called; without ``init(optimizer=...)`` steps are blocks.
        """
        return None if self._session is None else self._session.cursor

    # Curvature (what can be asked stands in Questions)

    def fit_curvature(
        self, loader: Iterable[Any], objective: Objective | None = None, *, name: str = "default", **options: Any
    ) -> Curvature:
        """Curvature of the tracked modules at full size, at the model's present weights, kept in the store as ``name``.

        A fit that was interrupted goes on when it is called again. ``options`` are those of
        :func:`logix_like.curvature.fit_curvature`; ``at=lambda: run.at_checkpoints("all")`` averages over checkpoints.

        Raises:
            ConfigError: the name is not that of a file, or that of the curvature which the training gives.
        """
        return fitted_curvature(self.path, self._logbook.tracker, loader, objective, name, options)

    def curvature(self, name: str = "default") -> Curvature:
        """What :meth:`fit_curvature` kept; ``"training"``: what ``statistics: [..., curvature]`` gathered in training.

        Raises:
            StoreNotFoundError: there is no curvature of that name, or nothing of it was written yet.
        """
        return kept_curvature(self.path, name)

    def _followed(self, rows: ProjectedBatch) -> None:
        for live in self._live:
            live.add(rows)

    def _stepped(self, step: int) -> None:
        if self._session is not None and self._session.handed_over:
            return  # the optimizer has outlived this run, and trains for a later one
        if self._recorder is not None:
            self._recorder.stepped(step)
        if self._logbook.watching and is_due(self.config.checkpoints, step):
            self.checkpoint()
