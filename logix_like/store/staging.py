"""Rows on their way to disk: gathered in one preallocated chunk, and encoded together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from logix_like.capture.batch import ProjectedBatch
from logix_like.layout import DataId, Layout
from logix_like.store.columns import id_text, value_text
from logix_like.store.encoding import Encoding, StoredRows
from logix_like.store.parts import EncodedRows, flag_nonfinite
from logix_like.store.schema import DATA_ID, METADATA, WRITER_COLUMNS, Flag, segment


class StagedChunk:
    """One chunk of rows in memory; encoded when it is to be written, and filled again.

    Where neither scales nor whoever wants to ``keep_rows`` needs them together, rows are encoded as they come.
    """

    def __init__(self, layout: Layout, encoding: Encoding, capacity: int, *, keep_rows: bool) -> None:
        self._layout = layout
        self._encoding = encoding
        # Allocated once, since fresh memory for each chunk costs a page fault every 4 KiB.
        self._whole = keep_rows or encoding.scaled
        self._rows = torch.empty(capacity if self._whole else 0, layout.width, dtype=encoding.staging)
        self._norms: list[Tensor] = []
        self._values = encoding.buffer(capacity, layout.width)
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
        """The waiting rows as they were given, ``[count, width]``, where they are kept; valid until :meth:`fill`."""
        return self._rows[: self.count]

    def fill(self, batch: ProjectedBatch, first: int) -> int:
        """Take rows of ``batch`` from row ``first`` on, as many as fit; returns how many."""
        taken = min(self.capacity - self.count, len(batch.data_id) - first)
        if taken < len(batch.data_id):
            batch = batch.select(slice(first, first + taken))
        target = slice(self.count, self.count + taken)
        if self._whole:
            self._rows[target] = batch.rows
        else:
            as_stored = batch.rows.dtype == self._encoding.dtype
            self._encode(batch.rows if as_stored else batch.rows.to(self._encoding.staging), target)
        self._columns.add(batch)
        self.count += taken
        return taken

    def encoded(self) -> EncodedRows:
        """The waiting rows as they will stand on disk, valid until :meth:`fill`.

        Rows that are not finite (or would not be, as stored) get their flag.
        """
        everything = slice(0, self.count)
        stored = self._encode(self.rows, everything) if self._whole else StoredRows(self._values[everything])
        norm = torch.cat(self._norms).double()
        rows = EncodedRows(stored, self._columns.numbers(norm.numpy()), self._columns.texts())
        flag_nonfinite(rows, self._encoding, self._layout)
        return rows

    def clear(self) -> None:
        """Forget the waiting rows."""
        self.count = 0
        self._norms = []
        self._columns = StagedColumns()

    def _encode(self, rows: Tensor, target: slice) -> StoredRows:
        self._norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=self._encoding.staging))
        return self._encoding.encode(rows, self._layout, self._values[target])


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
