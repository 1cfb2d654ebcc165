"""What the background writer does with each batch, without its thread."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from logix_like.capture.batch import ProjectedBatch
from logix_like.layout import Layout
from logix_like.statistics import Statistics, StatisticsAccumulator
from logix_like.store.arrays import write_group
from logix_like.store.commits import CloseRecord, CommitLog, RowsRecord, StatisticsRecord
from logix_like.store.encoding import Encoding
from logix_like.store.files import remove_tree
from logix_like.store.parts import EncodedRows, PartWriter
from logix_like.store.schema import (
    STATISTICS_FOLDER,
    TAILS,
    WRITER_COLUMNS,
    WRITERS,
    Flag,
)
from logix_like.store.staging import StagedChunk
from logix_like.store.sums import save_statistics

_WRITER_NAME = re.compile(r"([0-9]{1,9})-([0-9]{1,9})", re.ASCII)


def chunk_rows(layout: Layout, encoding: Encoding, chunk_mib: float) -> int:
    """Rows of a chunk of about ``chunk_mib`` MiB (at least one)."""
    return max(1, int(chunk_mib * 2**20) // max(1, layout.width * encoding.dtype.itemsize))


def parse_writer_name(name: str) -> tuple[int, int] | None:
    """``(attempt, rank)`` of a writer's folder name, None for any other name."""
    match = _WRITER_NAME.fullmatch(name)
    return None if match is None else (int(match[2]), int(match[1]))


def claim_writer(store: Path, rank: int, *, sync: bool = False) -> Path:
    """Create the folder of the next attempt of ``rank``; no two processes get the same one."""
    writers = store / WRITERS
    taken = [parse_writer_name(path.name) for path in writers.glob(f"{rank}-*")]
    attempt = 1 + max((name[0] for name in taken if name), default=0)
    while True:
        folder = writers / f"{rank}-{attempt}"
        try:
            folder.mkdir()
        except FileExistsError:
            attempt += 1
            continue
        write_group(folder, {"rank": rank, "attempt": attempt}, sync=sync)
        return folder


class RowPipeline:
    """Stages rows, gathers statistics, writes chunks and commits them; used by one thread at a time."""

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        encoding: Encoding,
        *,
        rows: int,
        statistics: StatisticsAccumulator | None = None,
        sync: bool = False,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._encoding = encoding
        self._sync = sync
        self._accumulator = statistics
        self._staged = StagedChunk(layout, encoding, rows, keep_rows=statistics is not None)
        self._main = self._part(folder, rows)
        self._log = CommitLog(folder, sync=sync)
        self._chunks = self._tails = self._generation = 0
        self._cursor = (-1, -1)
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
        """Take in the rows of one batch; each chunk that gets full is committed."""
        first = 0
        while first < len(batch.data_id):
            first += self._staged.fill(batch, first)
            self._cursor = (batch.epoch, batch.step)
            if self._staged.full:
                self._commit(self._main, "", self._chunks)
                self._chunks += 1
        # Moments are sums over the whole batch: one row that is not finite spoils them.
        if self._accumulator is not None and batch.moments is not None and batch.rows.isfinite().all():
            self._accumulator.add_moments(batch.moments)

    def flush(self) -> None:
        """Commit the rows that wait, as a short part of their own."""
        if not self.staged:
            return
        if self._tails == 0:
            write_group(self._folder / TAILS, sync=self._sync)
        name = f"{TAILS}/{self._tails}"
        write_group(self._folder / name, sync=self._sync)
        self._commit(self._part(self._folder / name, self.staged), name, 0)
        self._tails += 1

    def save_statistics(self, statistics: Statistics | None = None) -> None:
        """Write a new generation of the statistics, switch to it, and remove the old one.

        ``statistics`` stands in for the gathered ones. Call after :meth:`flush`, so that
        all gathered rows are committed.
        """
        if statistics is None:
            if self._accumulator is None or self._saved_at == self.committed:
                return
            statistics = self._accumulator.snapshot()
            self._saved_at = self.committed
        parent, generation = self._folder / STATISTICS_FOLDER, self._generation + 1
        if generation == 1:
            write_group(parent, sync=self._sync)
        save_statistics(parent / str(generation), statistics, sync=self._sync)
        self._log.append(StatisticsRecord(self._log.sequence, generation, statistics.rows))
        remove_tree(parent / str(self._generation))
        self._generation = generation

    def close(self) -> None:
        """Commit everything, trim the arrays and seal the record."""
        self.flush()
        self.save_statistics()
        if self._chunks:
            self._main.finish()
        self._log.append(CloseRecord(self._log.sequence))
        self._log.close()

    def abandon(self) -> None:
        """Let go of the record file after a failure; nothing is written."""
        self._log.close()

    def _part(self, folder: Path, rows: int) -> PartWriter:
        return PartWriter(
            folder,
            self._layout,
            self._encoding,
            chunk_rows=rows,
            column_names=WRITER_COLUMNS,
            sync=self._sync,
        )

    def _commit(self, part: PartWriter, name: str, chunk: int) -> None:
        encoded = self._staged.encoded()
        crc = part.write(chunk, encoded)
        finite = torch.from_numpy(encoded.numbers[:, 5].astype("int64") & int(Flag.NONFINITE) == 0)
        self._gather(self._staged.rows, finite)
        self._log.append(self._record(name, chunk, encoded, crc))
        self.committed += len(encoded)
        self.nonfinite += int((~finite).sum())
        self._staged.clear()

    def _gather(self, rows: Tensor, finite: Tensor) -> None:
        if self._accumulator is not None:
            kept = rows if finite.all() else rows[finite]
            self._accumulator.update(kept, covered=len(rows))

    def _record(self, name: str, chunk: int, rows: EncodedRows, crc: dict[str, int]) -> RowsRecord:
        epoch, step = self._cursor
        start = chunk * self._staged.capacity
        return RowsRecord(self._log.sequence, name, chunk, start, len(rows), crc, epoch, step)
