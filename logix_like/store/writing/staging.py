"""Rows on their way to disk: gathered in one preallocated chunk, and encoded together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from logix_like.capture.batch import ProjectedBatch
from logix_like.layout import DataId, Layout
from logix_like.store.encoding.kinds import Encoding
from logix_like.store.format.columns import id_text, value_text
from logix_like.store.format.parts import EncodedRows, flag_nonfinite
from logix_like.store.format.schema import DATA_ID, METADATA, WRITER_COLUMNS, Flag, segment


class StagedChunk:
    """One chunk of rows in memory, which is encoded when it is to be written, and filled again."""

    def __init__(self, layout: Layout, encoding: Encoding, capacity: int) -> None:
        self._layout = layout
        self._encoding = encoding
        # Allocated once, since fresh memory for each chunk costs a page fault every 4 KiB.
        self._rows = torch.empty(capacity, layout.width, dtype=encoding.staging)
        # Two, since one chunk is written while the next one is encoded.
        self._values, self._written = (encoding.buffer(capacity, layout.width) for _ in range(2))
        self._columns = StagedColumns()
        self.capacity = capacity
        self.count = 0
        """Rows that wait."""

    @property
    def missing(self) -> int:
        """How many rows still fit."""
        return self.capacity - self.count

    @property
    def rows(self) -> Tensor:
        """The waiting rows as they were given, ``[count, width]``; valid until :meth:`fill`."""
        return self._rows[: self.count]

    def fill(self, batches: Sequence[ProjectedBatch]) -> None:
        """Take the rows of some batches, no more than :attr:`missing`."""
        start = self.count
        self.count += sum(len(batch.data_id) for batch in batches)
        # All at once: the work of one batch is less than that of starting it.
        torch.cat([batch.rows for batch in batches], out=self._rows[start : self.count])
        for batch in batches:
            self._columns.add(batch)

    def encoded(self) -> EncodedRows:
        """The waiting rows as they will stand on disk.

        Rows that are not finite (or would not be, as stored) get their flag.
        """
        norm = torch.linalg.vector_norm(self.rows, dim=1).double().numpy()
        stored = self._encoding.encode(self.rows, self._layout, self._values[: self.count])
        rows = EncodedRows(stored, self._columns.numbers(norm), self._columns.texts())
        flag_nonfinite(rows, self._encoding, self._layout)
        return rows

    def clear(self) -> None:
        """Forget the waiting rows; what was encoded of them stays as it is until the next call of this."""
        self._values, self._written = self._written, self._values
        self.count = 0
        self._columns = StagedColumns()


class _Piece(NamedTuple):
    """What some rows of one batch carry besides their gradients."""

    ids: tuple[DataId, ...]
    told: tuple[int, int, float]
    loss: Tensor | None
    metadata: Mapping[str, tuple[str | int | float, ...]]
    flags: int
    """Those that the whole batch has."""


class StagedColumns:
    """What the waiting rows carry besides their gradients; put into arrays once for a whole chunk."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []

    def add(self, batch: ProjectedBatch) -> None:
        """Take the samples of a batch, which become the next rows."""
        flags = int(Flag.OVERFLOW) if batch.overflow else 0
        told = (batch.step, batch.epoch, batch.lr)
        self._pieces.append(_Piece(batch.data_id, told, batch.loss, batch.metadata, flags))

    def numbers(self, norm: np.ndarray) -> np.ndarray:
        """The columns ``WRITER_COLUMNS`` of all rows, float64 ``[rows, columns]``."""
        lengths = [len(piece.ids) for piece in self._pieces]
        told = np.array([piece.told for piece in self._pieces], dtype=np.float64)
        step, epoch, lr = np.repeat(told, lengths, axis=0).T
        columns = {"step": step, "epoch": epoch, "loss": self._losses(), "norm": norm, "lr": lr, "flags": self._flags()}
        return np.stack([columns[name] for name in WRITER_COLUMNS], axis=1)

    def texts(self) -> dict[str, list[str]]:
        """The columns of text by array; metadata that a batch did not have is ``null``."""
        # Ids were checked when their batch was put.
        texts = {DATA_ID: [i if type(i) is str else id_text(i)[0] for piece in self._pieces for i in piece.ids]}
        names = dict.fromkeys(name for piece in self._pieces for name in piece.metadata)
        return texts | {f"{METADATA}/{segment(name)}": self._values(name) for name in names}

    def _flags(self) -> np.ndarray:
        lengths = [len(piece.ids) for piece in self._pieces]
        flags = np.repeat([float(piece.flags) for piece in self._pieces], lengths)
        integer = [not isinstance(data_id, str) for piece in self._pieces for data_id in piece.ids]
        flags[np.array(integer)] += int(Flag.INTEGER_ID)
        return flags

    def _losses(self) -> np.ndarray:
        unknown = torch.tensor([torch.nan])
        losses = [unknown.expand(len(p.ids)) if p.loss is None else p.loss.reshape(-1) for p in self._pieces]
        return torch.cat(losses).detach().double().numpy()

    def _values(self, name: str) -> list[str]:
        values: list[str] = []
        for piece in self._pieces:
            given = piece.metadata.get(name)
            values += ["null"] * len(piece.ids) if given is None else [value_text(value) for value in given]
        return values
