"""The writing side of a run: from projected batches to a finished store."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from uuid import uuid4

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from logix_like.capture.batch import ProjectedBatch
from logix_like.config import Config
from logix_like.errors import (
    ConfigError,
    LogixError,
    StoreDamagedError,
    StoreError,
    StoreNotFoundError,
    StoreWriteError,
)
from logix_like.layout import DataId, Layout
from logix_like.projection import INITS
from logix_like.query.completion import whole_statistics
from logix_like.ranks import Ranks
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import (
    Flag,
    Place,
    StoreWriter,
    add_fingerprints,
    build_view,
    create_store,
    describe,
    open_store,
    read_manifest,
    save_checkpoint,
    supersede_samples,
    supersede_steps,
)
from logix_like.updates import optimizer_facts
from logix_like.weights import fingerprint, whole_tensors

_log = logging.getLogger(__name__)

DESCRIPTION_SECONDS = 300.0
"""How long a process waits for the first one to log a batch and so to describe the store."""
LONGEST_PAUSE = 0.5
"""Seconds between two looks for that."""

Projections = Mapping[str, tuple[Tensor | None, Tensor | None]]

_writing: weakref.WeakValueDictionary[str, StoreSession] = weakref.WeakValueDictionary()
"""The last session of this process at each place."""


class StoreSession:
    """One process's writing into one store, from its creation to :meth:`finish`.

    The writer's thread starts with the first batch, when the layout of a row is known. Of several processes
    (``torch.distributed``) the first makes the store and describes it; each writes a part of its own, so that no
    rows ever travel between them.
    """

    def __init__(
        self, path: Place, config: Config, *, resume: bool, overwrite: bool, resume_step: int | None = None
    ) -> None:
        self.path = path
        self._config = config
        self._ranks = Ranks.here()
        _require_projections_for(config, self._ranks)
        plain = config.model_dump(mode="json")
        self._writer: StoreWriter | None = None
        self.handed_over = False
        """Whether a later run of this process has taken over the store."""
        self.release: Callable[[], object] = bool
        """Hands over rows that are held back still; whoever holds any sets this."""
        self.finished = False
        """Whether :meth:`finish` has come to its end."""
        self._ending = False
        self._failed: Exception | None = None
        if (resume or overwrite) and (earlier := _writing.get(str(path))) is not None:
            earlier.hand_over(whole=resume)
        self.stopped = False
        """Whether the storage failed and the config's ``store.on_error`` is ``stop_logging``: nothing is written."""
        opened, self._subject = self._ranks.agree(
            lambda: (
                self.attempt(lambda: _open_place(path, plain, resume=resume, overwrite=overwrite, step=resume_step)),
                f"logix_like-{uuid4().hex}",
            )
        )
        self.stopped = not opened
        self.resumed = open_store(path) if resume and opened else None
        """The store as it was found, when a run is being resumed."""
        self._ranks.wait()  # so that all find it alike: no process logs before the others have read it
        self._statistics: frozenset[str] = frozenset()
        kept = () if self.resumed is None else self.resumed.checkpoints
        self._last_checkpoint = (kept[-1].step, kept[-1].fingerprint) if kept else None
        _writing[str(path)] = self

    @property
    def cursor(self) -> tuple[int, int] | None:
        """``(epoch, step)`` of the last row of the run that is being resumed, but for rows that were taken back."""
        if self.resumed is None or not len(self.resumed):
            return None
        if not self.resumed.retractions:
            return max((writer.cursor for writer in self.resumed.writers), key=lambda cursor: cursor[1], default=None)
        standing = np.flatnonzero((self.resumed.flags & Flag.SUPERSEDED) == 0)
        if not len(standing):
            return None
        last = standing[np.argmax(self.resumed.step[standing])]
        return int(self.resumed.epoch[last]), int(self.resumed.step[last])

    def begin(
        self, layout: Layout, projections: Projections, statistics: frozenset[str], optimizer: Optimizer | None
    ) -> None:
        """Write the module table, the projections and what the optimizer is; start the writer's thread."""
        self._statistics = statistics
        self.attempt(lambda: self._begin(layout, projections, statistics, optimizer))

    def attempt(self, act: Callable[[], object]) -> bool:
        """Write something, unless logging has stopped; whether it was written.

        Raises:
            StoreWriteError: the storage failed and the config's ``store.on_error`` is ``raise``; else that is logged
                once, and logging stops.
        """
        if self.stopped:
            return False
        try:
            act()
        except (StoreWriteError, OSError) as error:
            if self._config.store.on_error == "raise" or isinstance(error, StoreNotFoundError):
                raise
            self._stop(error)
            return False
        return True

    def keep(self, write: Callable[[], object]) -> None:
        """Write something beside the rows, if there are any, but never into a store that has taken this one's place."""
        self._require_own()
        if self._writer is not None and self.attempt(self._writer.require_present):
            self.attempt(write)

    def _stop(self, error: Exception) -> None:
        self.stopped = True
        if self._writer is None or not self._writer.told:
            _log.error("%s; logging has stopped, training goes on", error)
        if self._writer is not None:
            self._writer.told = True

    def _begin(
        self, layout: Layout, projections: Projections, statistics: frozenset[str], optimizer: Optimizer | None
    ) -> None:
        settings = self._config.store
        if not self._ranks.first:
            self._wait_for_description()
        try:
            describe(
                self.path,
                layout,
                settings.dtype,
                projections,
                projection=self._config.projection.model_dump(mode="json"),
                fingerprints={"structure": layout.fingerprint()},
                optimizer=None if optimizer is None else optimizer_facts(optimizer),
                durability=settings.durability,
            )
        except Exception as error:
            if self._ranks.first:
                self._ranks.post(self._subject, str(error))
            raise
        self._writer = StoreWriter(
            self.path,
            layout,
            settings.dtype,
            rank=self._ranks.rank,
            codec=settings.codec,
            chunk_mib=settings.chunk_mib,
            commit_seconds=settings.commit_seconds,
            durability=settings.durability,
            statistics=StatisticsAccumulator(layout, statistics),
            on_error=settings.on_error,
        )

    def _wait_for_description(self) -> None:
        """Return once the first process has described the store, which it does at the end of its first block."""
        ranks, deadline, pause = self._ranks, time.monotonic() + DESCRIPTION_SECONDS, 0.01
        while read_manifest(self.path).layout is None:
            failed = ranks.posted(self._subject)
            if failed is not None:
                raise StoreWriteError(
                    f"process 0 of {ranks.size} could not begin the store, so that this one (process {ranks.rank}) "
                    f"writes nothing: {failed}"
                )
            if time.monotonic() > deadline:
                raise StoreWriteError(
                    f"process {ranks.rank} of {ranks.size} has logged a batch, and process 0 none within "
                    f"{DESCRIPTION_SECONDS:.0f} seconds, so that {self.path} has no module table; every process must "
                    "log"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)  # each look is a request where the store is elsewhere

    def hand_over(self, *, whole: bool) -> None:
        """Commit and close, since a later run of this process takes over the store.

        A notebook whose cell was interrupted has no name for its run any more, which the traceback keeps alive.
        ``whole``: the later run goes on with the store, so that rows are written that are held back still.
        """
        try:
            if whole and not self.handed_over:
                self.release()
        except Exception as error:  # whatever it is, the later run is to begin
            _log.error("rows of the run before that were held back are not stored: %s", error)
        self.handed_over = True
        if self._writer is not None:
            try:
                self._writer.close()
            except StoreWriteError as error:  # what is committed is what the later run finds
                _log.error("%s", error)

    def _require_own(self) -> None:
        if self.handed_over:
            raise StoreError(
                f"this run has ended: a later init(...) of this process has taken over {self.path}; log with the run "
                "that it returned"
            )

    @property
    def begun(self) -> bool:
        """Whether a batch has arrived, or none is waited for any more."""
        return self._writer is not None or self.stopped

    @property
    def rows(self) -> int:
        """Rows that were handed to the writer, committed or not."""
        return 0 if self._writer is None else self._writer.rows

    @property
    def nonfinite(self) -> int:
        """Rows so far that were stored flagged because they are not finite."""
        return 0 if self._writer is None else self._writer.nonfinite

    def put(self, batch: ProjectedBatch) -> None:
        """Hand one batch to the writer; blocks while its queue is full.

        Raises:
            StoreWriteError: the writer failed and the config's ``store.on_error`` is ``raise``.
        """
        self._require_own()
        if self._writer is not None and not self.stopped:
            self._writer.put(batch)

    def commit(self) -> None:
        """Everything put so far is durable when this returns."""
        self._require_own()
        if self._writer is not None and not self.stopped:
            self._writer.commit()

    def forget(self, data_id: tuple[DataId, ...]) -> int:
        """Take all committed rows of some samples back; returns how many."""
        rows = supersede_samples(self.path, data_id)
        _keep_view(self.path)
        return rows

    def checkpoint(self, model: nn.Module, step: int, epoch: int, moments: Mapping[str, Tensor] | None = None) -> None:
        """Keep the model's weights and the optimizer's moments, unless the last checkpoint holds the same.

        Where weights are spread over processes (FSDP), all must call this together; the first one writes.
        """
        self._require_own()
        if self.stopped and self._ranks.size == 1:
            return
        seen = (step, fingerprint(model))
        if seen != self._last_checkpoint:
            if self._writer is not None:
                self.attempt(self._writer.require_present)  # never into a store that has taken this one's place
            state = {**whole_tensors(model), **(moments or {})}
            if self._ranks.first:
                self.attempt(lambda: save_checkpoint(self.path, state, step=step, epoch=epoch, fingerprint=seen[1]))
            self._last_checkpoint = seen

    def finish(self, model: nn.Module | None) -> None:
        """Commit, gather what needs all rows, and close; the store then holds its sample view.

        Called again after it has failed, it says again what was lost, or tries what is left once more (in one process:
        of several, the others would have to as well).

        Raises:
            StoreError: another process has died; this one's rows are safe by then.
        """
        self._require_own()
        if self._writer is None and self._ranks.size == 1:
            self.finished = True
            return
        if self._failed is not None and self._ranks.size > 1:
            raise self._failed
        try:
            self._end_rows()
            with self._together():
                weights = None if model is None else fingerprint(model)
                self._ranks.wait()
                self._ranks.once(lambda: self.attempt(lambda: _complete(self.path, weights)))
            self.finished = True
        except Exception as error:
            self._failed = error
            raise

    def _end_rows(self) -> None:
        """Commit and close, once all parts' statistics are together."""
        again, self._ending = self._ending, True
        if again and self._writer is not None:
            self._writer.close()
            self._writer.require_whole()
            return
        with self._writer or nullcontext(), self._together():
            if self._writer is not None and not self.stopped:
                self._writer.commit()
                self.attempt(self._writer.require_present)
            self._ranks.wait()  # so that statistics of all rows can be taken
            self._ranks.once(lambda: self.attempt(self._complete_statistics))

    def _complete_statistics(self) -> None:
        """Write what no start of the run has gathered alone: see :func:`whole_statistics`."""
        if self._writer is None or not self._statistics:
            return
        store = open_store(self.path)
        try:
            whole = whole_statistics(store, self._statistics)
        except StoreDamagedError as error:
            _tell_damage(error)
            return
        if whole is not store.statistics:
            self._writer.write_statistics(whole, store.whole_coverage)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say what it means when another process has died."""
        try:
            yield
        except LogixError:
            raise
        except RuntimeError as error:
            if self._ranks.size == 1:
                raise
            raise StoreError(
                f"the processes of this run could not end it together ({error}); all committed rows are safe: open "
                f"the store with logix.load({str(self.path)!r}), or go on with resume=True"
            ) from error


def _complete(path: Place, weights: str | None) -> None:
    """What is done once, when all rows are there."""
    if read_manifest(path).layout is None:
        return
    if weights is not None:
        add_fingerprints(path, {"weights": weights})
    _keep_view(path)


def _keep_view(path: Place) -> None:
    """Have the store hold the sample view of its rows, if all can be read."""
    try:
        build_view(path)
    except StoreDamagedError as error:
        _tell_damage(error)


def _tell_damage(error: StoreDamagedError) -> None:
    """Say that rows of an earlier start are damaged: whoever asks is told again, and this start's are safe."""
    _log.warning("%s; what is made of all rows was not written, all rows of this run are safe", error)


def _open_place(path: Place, config: dict[str, Any], *, resume: bool, overwrite: bool, step: int | None) -> None:
    create_store(path, config, resume=resume, overwrite=overwrite)
    if step is not None:
        supersede_steps(path, step)


def _require_projections_for(config: Config, ranks: Ranks) -> None:
    if ranks.size > 1 and INITS[config.projection.init].needs_moment:
        raise ConfigError(
            f"projection.init {config.projection.init!r} is made from the samples that one process sees, so that "
            f"{ranks.size} processes would each make another; use 'orthogonal' or 'gaussian', which come from the seed"
        )
