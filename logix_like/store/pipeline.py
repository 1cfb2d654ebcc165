"""What the background writer does with each batch, without its thread."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.layout import Layout
from logix_like.statistics import StatisticsAccumulator
from logix_like.store.arrays import write_group
from logix_like.store.behind import Behind, Inline
from logix_like.store.codecs import UNCOMPRESSED, Codec
from logix_like.store.encoding import Encoding
from logix_like.store.files import Place, files_of, names_in, remove_tree
from logix_like.store.rowwriter import PendingRows, RowWriter
from logix_like.store.schema import (
    INVALID,
    STATISTICS_FOLDER,
    WRITER_COLUMNS,
    WRITERS,
    Flag,
)
from logix_like.store.staging import StagedChunk
from logix_like.store.sums import StoredStatistics, save_statistics
from logix_like.timing import Timing

MERGED = "merged"
"""Part of a writer's name that stands for the rank where parts were merged into one."""
MERGED_RANK = -1
"""Its number."""
_WRITER_NAME = re.compile(rf"([0-9]{{1,9}}|{MERGED})-([0-9]{{1,9}})", re.ASCII)

STAGED_SHARE = 4
"""Rows that wait to be encoded take no more memory than this many chunks on disk."""


def chunk_rows(layout: Layout, encoding: Encoding, chunk_mib: float) -> int:
    """Rows of a chunk of about ``chunk_mib`` MiB, or less where they take :data:`STAGED_SHARE` times that in memory."""
    stored = encoding.stored_width(layout.width) * encoding.dtype.itemsize
    staged = layout.width * encoding.staging.itemsize / STAGED_SHARE
    return max(1, int(chunk_mib * 2**20 / max(1, stored, staged)))


def parse_writer_name(name: str) -> tuple[int, int] | None:
    """``(attempt, rank)`` of a writer's folder name, None for any other name."""
    match = _WRITER_NAME.fullmatch(name)
    return None if match is None else (int(match[2]), MERGED_RANK if match[1] == MERGED else int(match[1]))


def claim_writer(store: Place, rank: int, *, sync: bool = False) -> Place:
    """Create the folder of the next attempt of ``rank``; no two processes get the same one."""
    writers = store / WRITERS
    taken = [name for name in map(parse_writer_name, names_in(writers)) if name is not None]
    # Never a name again that a merged part has taken the place of: retractions name parts.
    attempt = 1 + max((attempt for attempt, owner in taken if owner in (rank, MERGED_RANK)), default=0)
    while True:
        folder = writers / f"{rank}-{attempt}"
        if files_of(folder).claim_folder(folder, sync=sync):
            write_group(folder, {"rank": rank, "attempt": attempt}, sync=sync)
            return folder
        attempt += 1


class RowPipeline:
    """Stages rows, gathers statistics, writes chunks and commits them; used by one thread at a time.

    Where that takes time (a disk that is waited for, an object store), one chunk is committed while the next is staged
    and encoded. ``guard`` is asked before each commit, and raises where nothing more may be written.
    """

    def __init__(
        self,
        folder: Place,
        layout: Layout,
        encoding: Encoding,
        *,
        rows: int,
        statistics: StatisticsAccumulator | None = None,
        codec: Codec = UNCOMPRESSED,
        sync: bool = False,
        guard: Callable[[], object] = bool,
    ) -> None:
        self._guard = guard
        self._sync = sync
        self._accumulator = statistics
        self._staged = StagedChunk(layout, encoding, rows, keep_rows=statistics is not None)
        self._rows = RowWriter(
            folder, layout, encoding, chunk_rows=rows, column_names=WRITER_COLUMNS, codec=codec, sync=sync
        )
        slow = sync or not isinstance(folder, Path)
        self._behind = Behind("logix_like-files") if slow else Inline()
        self._statistics_folder = self._rows.folder / STATISTICS_FOLDER
        self._generation = 0
        self._cursor = (-1, -1)
        self._timing = Timing()
        self._saved_at = -1
        self.committed = 0
        """Rows that are committed."""
        self.nonfinite = 0
        """How many of them are flagged as not finite."""

    @property
    def staged(self) -> int:
        """Rows that wait for their commit."""
        return self._staged.count

    def add(self, batch: ProjectedBatch) -> None:
        """Take in the rows of one batch; each chunk that gets full is flushed."""
        self._timing += batch.timing
        first = 0
        while first < len(batch.data_id):
            first += self._staged.fill(batch, first)
            self._cursor = (batch.epoch, batch.step)
            if self._staged.full:
                self.flush()
        moments = None if batch.overflow else batch.moments
        if self._accumulator is not None and moments is not None and batch.rows.isfinite().all():
            self._accumulator.add_moments(moments)

    def flush(self) -> None:
        """Have the rows that wait committed; fewer than a chunk become a short part of their own.

        They are when :meth:`wait` has returned; a failure is raised there, or by the next call of this.
        """
        if not self.staged:
            return
        rows = self._staged.encoded()
        flags = torch.from_numpy(rows.numbers[:, 5].astype("int64"))
        valid = flags & int(INVALID) == 0
        if self._accumulator is not None:
            given = self._staged.rows
            self._accumulator.update(given if valid.all() else given[valid], covered=len(rows))
        nonfinite = int((flags & int(Flag.NONFINITE) != 0).sum())
        epoch, step = self._cursor
        timing, self._timing = self._timing, Timing()
        pending = self._rows.prepare(rows, epoch=epoch, step=step, timing=timing)
        self._staged.clear()
        try:
            self._behind.run(partial(self._commit, pending, nonfinite))
        except BaseException:
            pending.discard()
            raise

    def wait(self) -> None:
        """Return once everything that was flushed is committed."""
        self._behind.wait()

    def _commit(self, pending: PendingRows, nonfinite: int) -> None:
        try:
            self._guard()
            pending.commit()
        finally:
            pending.discard()
        self.committed += pending.record.rows
        self.nonfinite += nonfinite

    def save_statistics(self, given: StoredStatistics | None = None) -> None:
        """Write a new generation of the statistics, switch to it, and remove the old one.

        Those ``given`` stand in for the gathered ones. Call after :meth:`flush`, so that
        all gathered rows are committed.
        """
        self.wait()
        if given is None:
            if self._accumulator is None or self._saved_at == self.committed:
                return
            given = StoredStatistics(self._accumulator.snapshot())
            self._saved_at = self.committed
        self.require_present()
        parent, generation = self._statistics_folder, self._generation + 1
        if generation == 1:
            write_group(parent, sync=self._sync)
        save_statistics(parent / str(generation), given.statistics, given.coverage, sync=self._sync)
        self._rows.record_statistics(generation, given.statistics.rows)
        remove_tree(parent / str(self._generation))
        self._generation = generation

    def require_present(self) -> None:
        """Raise :class:`StoreWriteError` when the part's store was removed or replaced."""
        self._rows.require_present()

    def close(self) -> None:
        """Commit everything and seal the record."""
        self.flush()
        self.save_statistics()
        self._behind.close()
        self._rows.seal()

    def abandon(self) -> None:
        """Let go of the record file after a failure; nothing more is written."""
        self._behind.close()
        self._rows.abandon()
