"""The background writer: a bounded queue before one thread that writes."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Literal, Self

import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import ConfigError, StoreError, StoreWriteError
from logix_like.layout import Layout
from logix_like.statistics import Statistics, StatisticsAccumulator
from logix_like.store.codecs import codec_named
from logix_like.store.columns import id_text, require_column_name, value_text
from logix_like.store.encoding import encoding_named
from logix_like.store.files import Place, as_place, files_of, named_errors
from logix_like.store.pipeline import RowPipeline, chunk_rows, claim_writer
from logix_like.store.schema import WRITERS, read_manifest
from logix_like.store.sums import Coverage, StoredStatistics

_log = logging.getLogger(__name__)

STATISTICS_SHARE = 0.05
"""Statistics are written at a timed commit only if that takes less than this share of the time."""

ROOM_SECONDS = 1.0
"""How often somebody who waits for room looks again, where another thread was woken in its place."""


@dataclass(frozen=True)
class _Request:
    """Something to do after all rows put before it."""

    last: bool = False
    statistics: StoredStatistics | None = None
    done: SimpleQueue[bool] = field(default_factory=SimpleQueue)
    """Whether it was, once that is known."""


class _Inbox:
    """A queue of batches, bounded by their bytes, and of requests, which are never held up.

    Ctrl-C may break off the training thread anywhere. Here it leaves nothing locked: all that is shared are queues
    whose calls cannot be broken off half-way, and numbers that one thread writes. (``threading.Condition`` stays
    locked for good when it is broken off in its ``__enter__``.)

    A putter that found it full is woken when half of it is free, not at each batch taken: two threads
    that hand the interpreter to and fro for every batch take several times as long.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: SimpleQueue[tuple[ProjectedBatch | _Request, int]] = SimpleQueue()
        self._put = self._taken = 0
        """Bytes so far. A put that is broken off may not be counted: that much more then fits, never less."""
        self._room: SimpleQueue[None] = SimpleQueue()
        self._awaited = False
        """Whether somebody may be waiting for room."""
        self.error: BaseException | None = None

    def put(self, item: ProjectedBatch | _Request, size: int = 0) -> bool:
        """Queue an item, waiting while it does not fit; False if the worker has failed."""
        while size and self.error is None and self._is_full_for(size):
            self._awaited = True
            if self._is_full_for(size):  # still: the worker, who looks after each item, cannot have missed the above
                with suppress(Empty):
                    self._room.get(timeout=ROOM_SECONDS)
        if self.error is not None:
            return False
        self._items.put((item, size))
        self._put += size
        return self.error is None

    def take(self, timeout: float | None) -> ProjectedBatch | _Request | None:
        """The next item, or None after ``timeout`` seconds without one."""
        try:
            item, size = self._items.get(timeout=timeout)
        except Empty:
            return None
        self._taken += size
        if self._awaited and 2 * (self._put - self._taken) <= self._limit:
            self._awaited = False
            self._room.put(None)
        return item

    def fail(self, error: BaseException) -> None:
        """Refuse all further items and wake everyone who waits."""
        self.error = error
        self._room.put(None)
        with suppress(Empty):
            while True:
                item, _ = self._items.get_nowait()
                if isinstance(item, _Request):
                    item.done.put(False)

    def _is_full_for(self, size: int) -> bool:
        waiting = self._put - self._taken
        return waiting > 0 and waiting + size > self._limit


class _Worker:
    """The thread's side: takes items out of the inbox until the last request or an error."""

    def __init__(self, inbox: _Inbox, pipeline: RowPipeline, commit_seconds: float) -> None:
        self._inbox = inbox
        self._pipeline = pipeline
        self._commit_seconds = commit_seconds
        self._waiting_since = 0.0
        self._next_statistics = 0.0
        self._ready: SimpleQueue[None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="logix_like-writer", daemon=True)

    def start(self) -> None:
        """Start the thread with one torch thread of its own.

        ``torch.set_num_threads`` sets the caller's number and the default of threads to come, so
        the starting thread puts its own number back.
        """
        threads = torch.get_num_threads()
        self.thread.start()
        self._ready.get()
        torch.set_num_threads(threads)

    def _run(self) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the default at its first look: have that happen now
        self._ready.put(None)
        request: _Request | None = None
        try:
            with torch.no_grad():
                while request is None or not request.last:
                    item = self._inbox.take(self._patience())
                    request = item if isinstance(item, _Request) else None
                    self._handle(item)
        except BaseException as error:  # whatever it is, the training thread has to hear of it
            self._pipeline.abandon()
            self._inbox.fail(error)
            if request is not None:
                request.done.put(False)

    def _patience(self) -> float | None:
        if not self._pipeline.staged:
            return None
        return max(0.0, self._waiting_since + self._commit_seconds - time.monotonic())

    def _handle(self, item: ProjectedBatch | _Request | None) -> None:
        if isinstance(item, _Request):
            self._answer(item)
            return
        if item is not None:
            # Full chunks in between do not put the timed commit off: it also writes the statistics.
            if not self._pipeline.staged:
                self._waiting_since = time.monotonic()
            item.wait()
            self._pipeline.add(item)
        if self._pipeline.staged and self._patience() == 0:
            self._timed_commit()

    def _timed_commit(self) -> None:
        self._pipeline.flush()
        start = time.monotonic()
        if start >= self._next_statistics:
            self._pipeline.save_statistics()
            end = time.monotonic()
            self._next_statistics = end + (end - start) / STATISTICS_SHARE

    def _answer(self, request: _Request) -> None:
        if request.last:
            self._pipeline.close()
        else:
            self._pipeline.flush()
            self._pipeline.save_statistics(request.statistics)
        request.done.put(True)


def _shut(inbox: _Inbox, thread: threading.Thread, process: int) -> None:
    """Flush and end the thread when its writer was forgotten or the interpreter exits."""
    if os.getpid() == process and inbox.put(_Request(last=True)):
        thread.join()


class StoreWriter:
    """Writes one process's rows to a described store, in the background.

    Every start makes a part of its own (``writers/<rank>-<attempt>``), so nothing is ever
    overwritten. A row is safe once :meth:`commit` (or :meth:`close`) has returned; full chunks,
    and every ``commit_seconds`` what waits, are committed without being asked.

    Args:
        path: The store's folder; :func:`~logix_like.store.creation.describe` was called on it.
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
        with named_errors(store):
            self._lock = files_of(store).lock(store, store / WRITERS, rank)
            try:
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
            except BaseException:
                self._lock.close()
                raise
        self._width = layout.width
        self._raises = on_error == "raise"
        self._inbox = _Inbox(int(queue_mib * 2**20))
        worker = _Worker(self._inbox, self._pipeline, commit_seconds)
        worker.start()
        self._thread = worker.thread
        self.told = False
        """Whether a failure was raised or logged."""
        self._process = os.getpid()
        self._finalizer = weakref.finalize(self, _shut, self._inbox, worker.thread, self._process)
        self.rows = 0
        """Rows that were put."""
        self.dropped = 0
        """Rows that were dropped after a failure, with ``on_error="stop_logging"``."""

    @property
    def committed(self) -> int:
        """Rows that are safe."""
        return self._pipeline.committed

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
        if self._inbox.put(batch, batch.rows.nbytes):
            self.rows += len(batch.data_id)
        else:
            self.dropped += len(batch.data_id)
            self._report()

    def commit(self) -> int:
        """Make all rows put so far durable, with their statistics; returns the committed rows."""
        self._require_open()
        return self._ask(_Request())

    def require_present(self) -> None:
        """Raise :class:`StoreWriteError` when the store was removed or replaced since the writer began."""
        self._pipeline.require_present()

    def write_statistics(self, statistics: Statistics, coverage: Coverage | None = None) -> None:
        """Commit, with these statistics in place of the gathered ones, and of those of all parts in ``coverage``."""
        self._require_open()
        self._ask(_Request(statistics=StoredStatistics(statistics, coverage)))

    def close(self) -> None:
        """Commit everything and end the thread; idempotent. A failure is raised if it was not before."""
        if not self._finalizer.alive or os.getpid() != self._process:
            return  # a forked child has no such thread, and its parent's rows are not its to flush
        self._finalizer.detach()
        self._inbox.put(_Request(last=True))
        self._thread.join()
        self._lock.close()
        if self._inbox.error is not None and not self.told:
            self._report()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: _Request) -> int:
        if not self._inbox.put(request) or not request.done.get():
            self._report()
        return self.committed

    def _require_open(self) -> None:
        if os.getpid() != self._process:
            raise StoreWriteError(
                f"the writer of {self.folder} belongs to process {self._process}, and this is process {os.getpid()}, "
                "forked from it without the thread that writes; no row was taken: log in the process that began, or "
                "start a run of a rank of its own here"
            )
        if not self._finalizer.alive:
            raise StoreWriteError(
                f"the writer of {self.folder} is closed; no row was taken, start a new writer to go on"
            )

    def _report(self) -> None:
        """Raise the worker's failure, or log it once."""
        cause = self._inbox.error
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
