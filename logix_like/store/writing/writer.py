"""The background writer: a bounded queue before one thread that writes."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from contextlib import ExitStack, suppress
from os import PathLike
from queue import SimpleQueue
from types import TracebackType
from typing import Literal, NoReturn, Self

import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import ConfigError, StoreError, StoreWriteError
from logix_like.layout import Layout
from logix_like.statistics import Statistics, StatisticsAccumulator
from logix_like.store.encoding.codecs import codec_named
from logix_like.store.encoding.kinds import encoding_named
from logix_like.store.format.columns import id_text, require_column_name, value_text
from logix_like.store.format.schema import WRITERS, read_manifest
from logix_like.store.format.sums import Coverage, StoredStatistics
from logix_like.store.places.files import Place, as_place, files_of, named_errors
from logix_like.store.writing.inbox import Inbox, Request, Taken
from logix_like.store.writing.pipeline import RowPipeline, chunk_rows, claim_writer

_log = logging.getLogger(__name__)

STATISTICS_SHARE = 0.05
"""Statistics are written at a timed commit only if that takes less than this share of the time."""


class _Worker:
    """The thread's side: takes items out of the inbox until the last request or an error."""

    def __init__(self, inbox: Inbox, pipeline: RowPipeline) -> None:
        self._inbox = inbox
        self._pipeline = pipeline
        self._next_statistics = 0.0
        self._ready: SimpleQueue[None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="logix_like-writer", daemon=True)

    def start(self) -> None:
        """Start the thread with one torch thread of its own.

        ``torch.set_num_threads`` sets the caller's number and the default of threads to come, so
        the starting thread puts its own number back.
        """
        threads = torch.get_num_threads()
        try:
            self.thread.start()
            self._ready.get()
        finally:
            torch.set_num_threads(threads)

    def abandon(self) -> None:
        """Have the thread end, before anything was put, whether it has begun or is about to."""
        self._inbox.ask(Request(last=True))
        if self.thread.ident is not None:
            self.thread.join()

    @property
    def is_here(self) -> bool:
        """Whether this is called by one of the threads that write."""
        return threading.current_thread() is self.thread or self._pipeline.is_behind

    @property
    def committed(self) -> int:
        """Rows that are safe."""
        return self._pipeline.committed

    def _run(self) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the default at its first look: have that happen now
        self._ready.put(None)
        taken, due = Taken(), math.inf
        try:
            self._pipeline.start()
            with torch.no_grad():
                while not any(request.last for request in taken.requests):
                    taken = Taken()  # what it held is not in the queue's bound any more
                    taken = self._inbox.take(self._pipeline.missing, due)
                    due = self._handle(taken)
            self._inbox.end(taken)
        except BaseException as error:  # whatever it is, the training thread has to hear of it
            with suppress(OSError):  # some storages say only when a file is closed that it has no room
                self._pipeline.abandon()
            self._inbox.end(taken, error)

    def _handle(self, taken: Taken) -> float:
        """Returns when the oldest row that is left waiting is due.

        Full chunks in between do not put a timed commit off: it also writes the statistics.
        """
        for batch in taken.batches:
            batch.wait()
        self._pipeline.add(taken.batches)
        for request in taken.requests:
            self._answer(request)
            if request.last:  # of several (a closing that was broken off asks again) the first
                break
        if not self._pipeline.staged:
            return math.inf
        if time.monotonic() < taken.due:
            return taken.due
        self._timed_commit()
        return math.inf

    def _timed_commit(self) -> None:
        self._pipeline.commit()
        start = time.monotonic()
        if start >= self._next_statistics:
            self._pipeline.save_statistics()
            end = time.monotonic()
            self._next_statistics = end + (end - start) / STATISTICS_SHARE

    def _answer(self, request: Request) -> None:
        if request.last:
            self._pipeline.close()
        else:
            self._pipeline.commit()
            self._pipeline.save_statistics(request.statistics)
        request.done.put(True)


def _shut(inbox: Inbox, worker: _Worker, folder: Place, process: int) -> None:
    """Flush and end the thread when its writer was forgotten or the interpreter exits.

    Writers in a reference cycle are forgotten in whichever thread collects it: those that write wait for nobody.
    """
    if os.getpid() != process:
        return
    if worker.is_here:
        inbox.ask(Request(last=True))
        return
    _end(inbox, worker.thread)
    if inbox.error is not None and not inbox.told:
        _log.error(
            "writing to %s failed: %r; %d rows are committed and safe, those behind them are not stored: end a run "
            "with finalize(), which raises this",
            folder,
            inbox.error,
            worker.committed,
        )


def _end(inbox: Inbox, thread: threading.Thread) -> None:
    """Return once everything is committed, or has failed, and the thread is done."""
    request = Request(last=True)
    if inbox.ask(request):
        request.done.get()  # and not join alone, which after a Ctrl-C takes the thread for one that has ended
    thread.join()


class StoreWriter:
    """Writes one process's rows to a described store, in the background.

    Every start makes a part of its own (``writers/<rank>-<attempt>``), so nothing is ever
    overwritten. A row is safe once :meth:`commit` (or :meth:`close`) has returned; full chunks,
    and every ``commit_seconds`` what waits, are committed without being asked.

    Args:
        path: The store's folder; :func:`~logix_like.store.format.creation.describe` was called on it.
        layout: The rows' module table; :class:`ModelMismatchError` if it is not the store's.
        encoding: Name of the stored type; must be the store's.
        rank: Number of this process among those that write.
        codec: Name of the compression of gradients; may be another one than in the store's other parts.
        chunk_mib: Size of a chunk on disk before compression; the memory used is about six times this and the queue.
        commit_seconds: How long a row may wait for its commit.
        queue_mib: Bound of the queue; :meth:`put` waits while it is full.
        durability: ``process``: commits survive the death of the process; ``commit``: a power
            loss too (every file is forced to the disk).
        statistics: Gathers over the rows that are finite, in the background; owned by the writer.
        on_error: ``raise``: the next call raises; ``stop_logging``: it is logged once and
            further rows are dropped and counted.

    Raises :class:`StoreError` when another writer, of whatever process, writes as the same rank.
    """

    def __init__(
        self,
        path: str | PathLike[str] | Place,
        layout: Layout,
        encoding: str = "bfloat16",
        *,
        rank: int = 0,
        codec: str = "none",
        chunk_mib: float = 4.0,
        commit_seconds: float = 60.0,
        queue_mib: float = 16.0,
        durability: Literal["process", "commit"] = "process",
        statistics: StatisticsAccumulator | None = None,
        on_error: Literal["raise", "stop_logging"] = "raise",
    ) -> None:
        _require_choice("durability", durability, ("process", "commit"))
        _require_choice("on_error", on_error, ("raise", "stop_logging"))
        store = as_place(path)
        stored_as, compression, sync = encoding_named(encoding), codec_named(codec), durability == "commit"
        _require_described(store, layout, encoding)
        rows = chunk_rows(layout, stored_as, chunk_mib)
        self._width = layout.width
        self._raises = on_error == "raise"
        self._inbox = Inbox(int(queue_mib * 2**20), commit_seconds)
        self._closing = False
        self._process = os.getpid()
        self.rows = 0
        """Rows that were put."""
        self.dropped = 0
        """Rows that were dropped after a failure, with ``on_error="stop_logging"``."""
        with ExitStack() as undo:  # what a failure or a Ctrl-C breaks off
            with named_errors(store):
                self._lock = files_of(store).lock(store, store / WRITERS, rank)
                undo.callback(self._lock.close)
                self.folder = claim_writer(store, rank, sync=sync)
                """The writer's part of the store."""
                self._pipeline = RowPipeline(
                    self.folder,
                    layout,
                    stored_as,
                    rows=rows,
                    statistics=statistics,
                    codec=compression,
                    sync=sync,
                    guard=self._lock.require,
                )
            worker = _Worker(self._inbox, self._pipeline)
            undo.callback(worker.abandon)
            worker.start()
            self._thread = worker.thread
            self._finalizer = weakref.finalize(self, _shut, self._inbox, worker, self.folder, self._process)
            undo.pop_all()

    @property
    def committed(self) -> int:
        """Rows that are safe."""
        return self._pipeline.committed

    @property
    def told(self) -> bool:
        """Whether a failure was raised or logged."""
        return self._inbox.told

    @told.setter
    def told(self, told: bool) -> None:
        self._inbox.told = told

    @property
    def nonfinite(self) -> int:
        """Committed rows that are flagged since they are not finite."""
        return self._pipeline.nonfinite

    def put(self, batch: ProjectedBatch) -> None:
        """Hand over a batch (its rows must not change afterwards); waits while the queue is full.

        Raises :class:`StoreError` if the batch does not fit the store, :class:`StoreWriteError` if
        the writer has failed or is closed.
        """
        self._require_open()
        _check_batch(batch, self._width)
        if not batch.data_id:
            return
        if self._inbox.put(batch):
            self.rows += len(batch.data_id)
        else:
            self.dropped += len(batch.data_id)
            self._report()

    def commit(self) -> int:
        """Make all rows put so far durable, with their statistics; returns the committed rows."""
        self._require_open()
        return self._ask(Request())

    def require_present(self) -> None:
        """Raise :class:`StoreWriteError` when the store was removed or replaced since the writer began."""
        self._pipeline.require_present()

    def write_statistics(self, statistics: Statistics, coverage: Coverage | None = None) -> None:
        """Commit, with these statistics in place of the gathered ones, and of those of all parts in ``coverage``."""
        self._require_open()
        self._ask(Request(statistics=StoredStatistics(statistics, coverage)))

    def close(self) -> None:
        """Commit everything and end the thread; idempotent. A failure is raised if it was not before.

        Where it is broken off (Ctrl-C) rows go on being committed, and it may be called again.
        """
        if not self._finalizer.alive or os.getpid() != self._process:
            return  # a forked child has no such thread, and its parent's rows are not its to flush
        self._closing = True
        _end(self._inbox, self._thread)
        self._lock.close()
        self._finalizer.detach()
        if self._inbox.error is not None and not self.told:
            self._report()

    def require_whole(self) -> None:
        """Raise the failure of the writer again, if there was one and it is to be raised."""
        if self._inbox.error is not None and self._raises:
            self._report()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: Request) -> int:
        if not self._inbox.ask(request) or not request.done.get():
            self._report()
        return self.committed

    def _require_open(self) -> None:
        if os.getpid() != self._process:
            raise StoreWriteError(
                f"the writer of {self.folder} belongs to process {self._process}, and this is process {os.getpid()}, "
                "forked from it without the thread that writes; no row was taken: log in the process that began, or "
                "start a run of a rank of its own here"
            )
        if self._closing:
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise StoreWriteError(f"the writer of {self.folder} is closed; no row was taken, start a new writer to go on")

    def _report(self) -> None:
        """Raise the worker's failure, or log it once."""
        cause = self._inbox.error
        if cause is None:  # it was closed meanwhile, by a handler of a signal or another thread
            self._refuse()
        message = str(cause)
        if not isinstance(cause, StoreWriteError):  # which says by itself what is to be done
            message = (
                f"writing to {self.folder} failed: {cause!r}; {self.committed} of {self.rows} rows are "
                "committed and safe; see to the cause (disk space, permissions) and go on with resume=True"
            )
        if self._raises:
            self.told = True
            raise StoreWriteError(message) from cause
        if not self.told:
            self.told = True
            _log.error("%s; logging has stopped, training goes on", message)


def _require_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; known: {', '.join(known)}")


def _require_described(store: Place, layout: Layout, encoding: str) -> None:
    manifest = read_manifest(store)
    if manifest.layout is None:
        raise StoreError(f"{store} has no module table yet; call describe(...) before writing to it")
    manifest.layout.require_same(layout)
    if manifest.encoding != encoding:
        raise ConfigError(
            f"the store's dtype is {manifest.encoding!r}, asked for was {encoding!r}; "
            "go on with the store's, or start another store"
        )


def _check_batch(batch: ProjectedBatch, width: int) -> None:
    """Refuse what cannot be stored, while the caller's line is on the stack."""
    count = len(batch.data_id)
    if batch.rows.shape != (count, width):
        raise StoreError(
            f"a batch has rows of shape {tuple(batch.rows.shape)} for {count} ids, "
            f"expected ({count}, {width}); give one id for each sample"
        )
    columns = {name: len(values) for name, values in batch.metadata.items()}
    if batch.loss is not None:
        columns["loss"] = batch.loss.numel()
    for name, length in columns.items():
        if length != count:
            raise StoreError(f"{name!r} has {length} values for {count} samples; give one for each")
    for data_id in batch.data_id:
        id_text(data_id)
    for name, values in batch.metadata.items():
        require_column_name(name)
        for value in values:
            value_text(value)
