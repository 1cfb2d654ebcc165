"""What the background writer does with each batch, without its thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from logix_like.capture.batch import ProjectedBatch
from logix_like.layout import Layout
from logix_like.statistics import StatisticsAccumulator
from logix_like.store.encoding.codecs import UNCOMPRESSED, Codec
from logix_like.store.encoding.kinds import Encoding
from logix_like.store.format.arrays import write_group
from logix_like.store.format.attempts import MERGED_RANK, parse_writer_name
from logix_like.store.format.parts import EncodedRows
from logix_like.store.format.schema import (
    INVALID,
    STATISTICS_FOLDER,
    WRITER_COLUMNS,
    WRITERS,
    Flag,
)
from logix_like.store.format.sums import StoredStatistics, save_statistics
from logix_like.store.places.files import Place, files_of, names_in, remove_tree
from logix_like.store.writing.behind import Behind
from logix_like.store.writing.rowwriter import RowWriter
from logix_like.store.writing.staging import StagedChunk
from logix_like.timing import Timing

STAGED_SHARE = 4
"""Rows that wait to be encoded take no more memory than this many chunks on disk."""


def chunk_rows(layout: Layout, encoding: Encoding, chunk_mib: float) -> int:
    """Rows of a chunk of about ``chunk_mib`` MiB, or less where they take :data:`STAGED_SHARE` times that in memory."""
    stored = encoding.stored_width(layout.width) * encoding.dtype.itemsize
    staged = layout.width * encoding.staging.itemsize / STAGED_SHARE
    return max(1, int(chunk_mib * 2**20 / max(1, stored, staged)))


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

    One chunk is written and committed while the next is staged and encoded. ``guard`` is asked before each commit, and
    raises where nothing more may be written.
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
        self._sync = sync
        self._accumulator = statistics
        self._staged = StagedChunk(layout, encoding, rows)
        self._rows = RowWriter(
            folder,
            layout,
            encoding,
            chunk_rows=rows,
            column_names=WRITER_COLUMNS,
            codec=codec,
            sync=sync,
            guard=guard,
        )
        self._behind = Behind("logix_like-files")
        self._statistics_folder = self._rows.folder / STATISTICS_FOLDER
        self._generation = 0
        self._cursor = (-1, -1)
        self._timing = Timing()
        self._saved_at = -1
        self.committed = 0
        """Rows that are committed."""
        self.nonfinite = 0
        """How many of them are flagged as not finite."""

    def start(self) -> None:
        """Called first by the thread that uses this: it starts one more, for which an interpreter's end is too late."""
        self._behind.start()

    @property
    def is_behind(self) -> bool:
        """Whether this is called by the thread that was started."""
        return self._behind.is_here

    @property
    def staged(self) -> int:
        """Rows that wait for their commit."""
        return self._staged.count

    @property
    def missing(self) -> int:
        """Rows that the next chunk still takes."""
        return self._staged.missing

    def add(self, batches: Iterable[ProjectedBatch]) -> None:
        """Take in the rows of some batches; each chunk that gets full is flushed."""
        fitting: list[ProjectedBatch] = []
        room = self.missing
        for batch in batches:
            self._timing += batch.timing
            rest = batch
            while len(rest.data_id) >= room:
                self._fill([*fitting, rest.select(slice(room))])
                self._flush()
                fitting, rest, room = [], rest.select(slice(room, None)), self.missing
            if rest.data_id:
                fitting.append(rest)
                room -= len(rest.data_id)
            self._add_moments(batch)
        self._fill(fitting)

    def _fill(self, batches: list[ProjectedBatch]) -> None:
        if batches:
            self._staged.fill(batches)
            self._cursor = (batches[-1].epoch, batches[-1].step)

    def _add_moments(self, batch: ProjectedBatch) -> None:
        moments = None if batch.overflow else batch.moments
        if self._accumulator is not None and moments is not None and _finite(batch.rows):
            self._accumulator.add_moments(moments)

    def commit(self) -> None:
        """Commit all rows that wait; fewer than a chunk become a short part of their own."""
        self._flush()
        self._behind.wait()

    def _flush(self) -> None:
        """Begin to commit the rows that wait; a failure is raised by the next call of this."""
        if not self.staged:
            return
        rows = self._staged.encoded()
        flags = torch.from_numpy(rows.numbers[:, WRITER_COLUMNS.index("flags")].astype("int64"))
        valid = flags & int(INVALID) == 0
        if self._accumulator is not None:
            given = self._staged.rows
            self._accumulator.update(given if valid.all() else given[valid], covered=len(rows))
        nonfinite = int((flags & int(Flag.NONFINITE) != 0).sum())
        timing, self._timing = self._timing, Timing()
        self._behind.run(partial(self._write, rows, *self._cursor, timing, nonfinite))
        self._staged.clear()

    def _write(self, rows: EncodedRows, epoch: int, step: int, timing: Timing, nonfinite: int) -> None:
        self._rows.write(rows, epoch=epoch, step=step, timing=timing)
        self.committed += len(rows)
        self.nonfinite += nonfinite

    def save_statistics(self, given: StoredStatistics | None = None) -> None:
        """Write a new generation of the statistics, switch to it, and remove the old one.

        Those ``given`` stand in for the gathered ones. Call after :meth:`commit`, so that
        all gathered rows are committed.
        """
        if given is None:
            if self._accumulator is None or self._saved_at == self.committed:
                return
            given = StoredStatistics(self._accumulator.snapshot())
        self.require_present()
        parent, generation = self._statistics_folder, self._generation + 1
        if generation == 1:
            write_group(parent, sync=self._sync)
        save_statistics(parent / str(generation), given.statistics, given.coverage, sync=self._sync)
        self._rows.record_statistics(generation, given.statistics.rows)
        self._saved_at = self.committed
        remove_tree(parent / str(self._generation))
        self._generation = generation

    def require_present(self) -> None:
        """Raise :class:`StoreWriteError` when the part's store was removed or replaced."""
        self._rows.require_present()

    def close(self) -> None:
        """Commit everything and seal the record."""
        self.commit()
        self.save_statistics()
        self._behind.close()
        self._rows.seal()

    def abandon(self) -> None:
        """Let go of the record file after a failure; nothing more is written."""
        self._behind.close()
        self._rows.abandon()


def _finite(rows: Tensor) -> bool:
    """Whether all numbers are; their norm tells it in a fortieth of the time, unless it overflows."""
    return bool(torch.linalg.vector_norm(rows).isfinite()) or bool(rows.isfinite().all())
