"""Rows on their way to disk: encoded as they come into one preallocated chunk."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from logix_like.capture.batch import ProjectedBatch
from logix_like.layout import DataId, Layout
from logix_like.store.columns import id_text, value_text
from logix_like.store.encoding import Encoding
from logix_like.store.parts import EncodedRows
from logix_like.store.schema import DATA_ID, METADATA, WRITER_COLUMNS, Flag, segment

SUSPICIOUS_NORM = 1e18
"""A row of a smaller norm (in float32) is finite, and stays so in each encoding."""


class StagedChunk:
    """One chunk of rows in memory, encoded as they come; written, and filled again.

    The rows as they were given are kept beside them where ``keep_rows`` asks for it.
    """

    def __init__(self, layout: Layout, encoding: Encoding, capacity: int, *, keep_rows: bool) -> None:
        self._layout = layout
        self._encoding = encoding
        # Allocated once, since fresh memory for each chunk costs a page fault every 4 KiB.
        self._values = torch.empty(capacity, layout.width, dtype=encoding.dtype)
        self._scale = torch.empty(capacity, len(layout)) if encoding.scaled else None
        self._rows = torch.empty(capacity if keep_rows else 0, layout.width, dtype=encoding.staging)
        self._norm = torch.empty(capacity, dtype=encoding.staging)
        self._columns = StagedColumns()
        self.capacity = capacity
        self.count = 0
        """Rows that wait."""

    @property
    def full(self) -> bool:
        """Whether no further row fits."""
        return self.count == self.capacity

    @property
    def rows(self) -> Tensor:
        """The waiting rows as they were given, ``[count, width]``; valid until the next :meth:`fill`."""
        return self._rows[: self.count]

    def fill(self, batch: ProjectedBatch, first: int) -> int:
        """Encode rows of ``batch`` from row ``first`` on, as many as fit; returns how many."""
        taken = min(self.capacity - self.count, len(batch.data_id) - first)
        source, target = slice(first, first + taken), slice(self.count, self.count + taken)
        rows = batch.rows[source].to(self._encoding.staging)
        scale = self._encoding.encode(rows, self._layout, self._values[target])
        if self._scale is not None and scale is not None:
            self._scale[target] = scale
        if len(self._rows):
            self._rows[target] = rows
        torch.linalg.vector_norm(rows, dim=1, out=self._norm[target])
        self._columns.add(batch, source, self.count)
        self.count += taken
        return taken

    def encoded(self) -> EncodedRows:
        """The waiting rows as they will stand on disk, valid until the next :meth:`fill`.

        Rows that are not finite (or would not be, as stored) get their flag.
        """
        values = self._values[: self.count]
        scale = None if self._scale is None else self._scale[: self.count]
        norm = self._norm[: self.count].double()
        numbers = self._columns.numbers(norm.numpy())
        for row in (~(norm < SUSPICIOUS_NORM)).nonzero().flatten().tolist():
            own = None if scale is None else scale[row : row + 1]
            stored = self._encoding.decode(values[row : row + 1], own, self._layout).double()
            numbers[row, 3] = torch.linalg.vector_norm(stored)
            if not stored.isfinite().all():
                numbers[row, 5] = int(numbers[row, 5]) | Flag.NONFINITE
        return EncodedRows(values, scale, numbers, self._columns.texts())

    def clear(self) -> None:
        """Forget the waiting rows."""
        self.count = 0
        self._columns = StagedColumns()


class StagedColumns:
    """What the waiting rows carry besides their gradients; put into arrays once for a whole chunk."""

    def __init__(self) -> None:
        self._ids: list[DataId] = []
        self._batches: list[tuple[int, int, float]] = []
        self._lengths: list[int] = []
        self._losses: list[Tensor] = []
        self._metadata: dict[str, dict[int, tuple[str | int | float, ...]]] = {}

    def add(self, batch: ProjectedBatch, source: slice, start: int) -> None:
        """Take the samples ``source`` of a batch, which become the rows from ``start`` on."""
        ids = batch.data_id[source]
        self._ids += ids
        self._batches.append((batch.step, batch.epoch, batch.lr))
        self._lengths.append(len(ids))
        loss = torch.full((len(ids),), torch.nan) if batch.loss is None else batch.loss[source]
        self._losses.append(loss.detach().reshape(-1))
        for name, values in batch.metadata.items():
            self._metadata.setdefault(name, {})[start] = values[source]

    def numbers(self, norm: np.ndarray) -> np.ndarray:
        """The columns ``WRITER_COLUMNS`` of all rows, float64 ``[rows, columns]``."""
        step, epoch, lr = np.repeat(np.array(self._batches, dtype=np.float64), self._lengths, axis=0).T
        columns = {
            "step": step,
            "epoch": epoch,
            "loss": torch.cat([loss.double() for loss in self._losses]).numpy(),
            "norm": norm,
            "lr": lr,
            "flags": [0 if isinstance(data_id, str) else int(Flag.INTEGER_ID) for data_id in self._ids],
        }
        return np.stack([np.asarray(columns[name], np.float64) for name in WRITER_COLUMNS], axis=1)

    def texts(self) -> dict[str, list[str]]:
        """The columns of text by array; metadata that a batch did not have is ``null``."""
        texts = {DATA_ID: [id_text(data_id)[0] for data_id in self._ids]}
        for name, pieces in self._metadata.items():
            column = ["null"] * len(self._ids)
            for start, values in pieces.items():
                column[start : start + len(values)] = [value_text(value) for value in values]
            texts[f"{METADATA}/{segment(name)}"] = column
        return texts
