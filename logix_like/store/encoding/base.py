"""What every encoding of rows is: stored numbers, the scales that go with them, and a way to and fro."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from logix_like.layout import Layout

PIECE_BYTES = 2**21
"""Rows are worked on in pieces of this size, decoded, which stay in a processor's cache."""


@dataclass(frozen=True)
class StoredRows:
    """Rows as they are stored; what they were is ``values * scale * coordinate_scale``."""

    values: Tensor
    """``[n, stored width]`` of the encoding's type."""
    scale: Tensor | None = None
    """``[n, modules]`` float32, where the encoding has one for each row and module."""
    coordinate_scale: Tensor | None = None
    """``[width]`` float32, where the rows of a chunk share one for each coordinate."""

    def __len__(self) -> int:
        return len(self.values)

    def select(self, rows: slice | Tensor) -> StoredRows:
        """Some of the rows; views where ``rows`` is a slice."""
        scale = None if self.scale is None else self.scale[rows]
        return StoredRows(self.values[rows], scale, self.coordinate_scale)


class Encoding(ABC):
    """Turns the rows of a chunk into stored numbers and back."""

    name: ClassVar[str]
    """What the config and the manifest call it."""
    dtype: ClassVar[torch.dtype]
    """Type of the stored numbers, as torch sees them."""
    staging: ClassVar[torch.dtype] = torch.float32
    """Type in which rows wait to be encoded, and in which they are decoded."""
    data_type: ClassVar[str]
    """Zarr's name of the stored type."""
    fill_value: ClassVar[Any] = "NaN"
    """What a Zarr reader sees where a chunk is missing: never a number, by itself or by its scale."""
    scaled: ClassVar[bool] = False
    """Whether each row and module has a scale."""
    coordinate_scaled: ClassVar[bool] = False
    """Whether each chunk has a scale for each coordinate."""
    packed: ClassVar[bool] = False
    """Whether a stored number holds several of a row's."""

    def stored_width(self, width: int) -> int:
        """How many stored numbers a row of ``width`` numbers takes."""
        return width

    def row_bytes(self, layout: Layout) -> int:
        """Bytes of a stored row with its scales; scales by coordinate, one for many rows, are left out."""
        return self.stored_width(layout.width) * self.dtype.itemsize + (4 * len(layout) if self.scaled else 0)

    def attributes(self) -> dict[str, Any]:
        """What a Zarr reader has to know to decode the array."""
        return {"dtype": self.name}

    def buffer(self, rows: int, width: int) -> Tensor:
        """Memory for ``rows`` stored rows, not set."""
        return torch.empty(rows, self.stored_width(width), dtype=self.dtype)

    @abstractmethod
    def encode(self, rows: Tensor, layout: Layout, values: Tensor) -> StoredRows:
        """Encode ``rows [n, width]`` of ``staging`` type into ``values [n, stored width]``; ``rows`` stay as they are.

        The same rows give the same bytes; nothing is kept from one call to the next.
        """

    def decode(
        self, stored: StoredRows, layout: Layout, out: Tensor | None = None, *, in_units: bool = False
    ) -> Tensor:
        """The rows ``[n, width]`` again, of ``staging`` type, written into ``out`` or else into a new tensor.

        ``in_units`` leaves each coordinate in units of ``coordinate_scale``, where the rows have one.
        """
        if out is None:
            out = torch.empty(len(stored), layout.width, dtype=self.staging)
        blocks = self._blocks(stored, layout)
        step = piece_rows(layout.width)
        for start in range(0, len(stored), step):
            piece = stored.select(slice(start, start + step))
            part = out[start : start + step].copy_(self.codes(piece, layout))
            if blocks is not None and piece.scale is not None:
                blocks.scale(part, piece.scale)
            if piece.coordinate_scale is not None and not in_units:
                part.mul_(piece.coordinate_scale)
        return out

    def _blocks(self, stored: StoredRows, layout: Layout) -> Blocks | None:
        """The modules that have scales; refuses rows without theirs."""
        scales = (self.scaled, stored.scale), (self.coordinate_scaled, stored.coordinate_scale)
        if any(needed and scale is None for needed, scale in scales):
            raise ValueError(f"{self.name} rows are decoded with their scales")
        return Blocks(layout) if self.scaled else None

    def codes(self, stored: StoredRows, layout: Layout) -> Tensor:
        """The numbers ``[n, width]`` that scales multiply; the stored ones themselves unless they are packed."""
        return stored.values


class Blocks:
    """The modules of a row; those of one size that follow one another are worked on together."""

    def __init__(self, layout: Layout) -> None:
        self._runs: list[tuple[slice, slice, int]] = []
        for number, size in enumerate(block.size for block in layout):
            if self._runs and self._runs[-1][2] == size:
                columns, modules, _ = self._runs.pop()
                start, first = columns.start, modules.start
            else:
                start, first = layout[number].offset, number
            self._runs.append((slice(start, layout[number].columns.stop), slice(first, number + 1), size))

    def largest(self, rows: Tensor) -> Tensor:
        """Largest magnitude of each row and module, ``[n, modules]``."""
        # Several times as fast as abs().amax(), which writes the magnitudes out, and as the infinity norm.
        return torch.cat([torch.maximum(part.amax(2), -part.amin(2)) for part in self._split(rows)], dim=1)

    def mean(self, rows: Tensor) -> Tensor:
        """Mean of each row and module, ``[n, modules]``."""
        return torch.cat([part.mean(2) for part in self._split(rows)], dim=1)

    def scale(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Multiply each module's columns of ``rows [n, width]`` by its column of ``scale [n, modules]``, in place."""
        for part, (_, modules, _) in zip(self._split(rows), self._runs, strict=True):
            part.mul_(scale[:, modules].unsqueeze(2))
        return rows

    def _split(self, rows: Tensor) -> list[Tensor]:
        """Views ``[n, modules of a run, size]``."""
        return [rows[:, columns].unflatten(1, (-1, size)) for columns, _, size in self._runs]


def piece_rows(width: int) -> int:
    """How many rows a piece has."""
    return max(1, PIECE_BYTES // max(1, 4 * width))
