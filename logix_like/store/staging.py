"""Rows on their way to disk: collected in one preallocated chunk, then encoded together."""

from __future__ import annotations

from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from logix_like.capture.batch import ProjectedBatch
from logix_like.layout import Layout
from logix_like.store.columns import id_text, value_text
from logix_like.store.encoding import Encoding
from logix_like.store.parts import EncodedRows
from logix_like.store.schema import DATA_ID, METADATA, WRITER_COLUMNS, Flag, segment

SUSPICIOUS_NORM = 1e18
"""A row of a smaller norm (in float32) is finite, and stays so in each encoding."""


class StagedChunk:
    """One chunk of rows in memory; filled batch by batch, encoded, and filled again."""

    def __init__(self, layout: Layout, encoding: Encoding, capacity: int) -> None:
        self._layout = layout
        self._encoding = encoding
        self._rows = torch.empty(capacity, layout.width, dtype=encoding.staging)
        # Kept, since fresh memory for each chunk costs a page fault every 4 KiB.
        self._values = torch.empty(capacity, layout.width, dtype=encoding.dtype)
        self._numbers = np.empty((capacity, len(WRITER_COLUMNS)))
        self._texts: dict[str, list[str]] = {DATA_ID: []}
        self.capacity = capacity
        self.count = 0
        """Rows that wait."""

    @property
    def full(self) -> bool:
        """Whether no further row fits."""
        return self.count == self.capacity

    def fill(self, batch: ProjectedBatch, first: int) -> int:
        """Copy rows of ``batch`` from row ``first`` on, as many as fit; returns how many."""
        taken = min(self.capacity - self.count, len(batch.data_id) - first)
        source, target = slice(first, first + taken), slice(self.count, self.count + taken)
        self._rows[target].copy_(batch.rows[source])
        loss = torch.full((taken,), torch.nan) if batch.loss is None else batch.loss.detach()[source]
        ids = [id_text(data_id) for data_id in batch.data_id[source]]
        numbers = self._numbers[target]
        numbers[:, 0], numbers[:, 1], numbers[:, 4] = batch.step, batch.epoch, batch.lr
        numbers[:, 2] = loss.to(torch.float64).numpy()
        numbers[:, 5] = [Flag.INTEGER_ID if integer else 0 for _, integer in ids]
        self._add_texts(batch, source, [text for text, _ in ids])
        self.count += taken
        return taken

    def _add_texts(self, batch: ProjectedBatch, source: slice, ids: list[str]) -> None:
        self._texts[DATA_ID] += ids
        for name in batch.metadata:
            # Rows before the column's first value have none.
            self._texts.setdefault(f"{METADATA}/{segment(name)}", ["null"] * self.count)
        for array, texts in self._texts.items():
            if array != DATA_ID:
                texts += repeat("null", self.count + len(ids) - len(texts))
        for name, values in batch.metadata.items():
            column = self._texts[f"{METADATA}/{segment(name)}"]
            column[self.count :] = [value_text(value) for value in values[source]]

    def encode(self) -> tuple[EncodedRows, Tensor]:
        """The waiting rows as they will stand on disk, and as they were given, ``[count, width]``.

        Both are valid until the next :meth:`fill`. Rows that are not finite (or would not be, as
        stored) get their flag.
        """
        rows, values = self._rows[: self.count], self._values[: self.count]
        scale = self._encoding.encode(rows, self._layout, values)
        norm = torch.linalg.vector_norm(rows, dim=1)
        numbers = self._numbers[: self.count]
        for row in (~(norm < SUSPICIOUS_NORM)).nonzero().flatten().tolist():
            own = None if scale is None else scale[row : row + 1]
            stored = self._encoding.decode(values[row : row + 1], own, self._layout).double()
            norm[row] = torch.linalg.vector_norm(stored)
            if not stored.isfinite().all():
                numbers[row, 5] = int(numbers[row, 5]) | Flag.NONFINITE
        numbers[:, 3] = norm.double().numpy()
        return EncodedRows(values, scale, numbers, self._texts), rows

    def clear(self) -> None:
        """Forget the waiting rows."""
        self.count = 0
        self._texts = {DATA_ID: []}
