"""Encodings of few bits a number: whole numbers times a scale by row and module and one by coordinate.

Rounding errors should be alike in the metric in which rows are compared, where a coordinate counts by the
inverse of its second moment (plus damping). So each coordinate of a chunk's rows is divided by the root of that
before rounding, and then each row and module is given the range that its own numbers need.

The coordinates' scale is made from the chunk's own rows and stored with it: a chunk decodes by itself, a resumed run
has nothing to take up, and the same rows give the same bytes. Every row counts alike in it, however large, since
its blocks are first divided by their largest number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from logix_like.layout import Layout
from logix_like.store.encoding.base import Blocks, Encoding, StoredRows, piece_rows
from logix_like.store.encoding.packing import pack, packed_width, unpack

TINY = torch.finfo(torch.float32).tiny
"""Below the smallest normal number a scale would lose bits; a block so small is zero for any purpose."""


class _Quantised(Encoding):
    """Codes of 8, 4 or 1 bits with both scales.

    A block that is not finite has the scale NaN, and so has a chunk that a Zarr reader misses; a block of zeros has
    the scale 0.
    """

    scaled = True
    coordinate_scaled = True
    damping: ClassVar[float]
    """Added to the second moment of each coordinate, as a share of its module's mean."""

    def encode(self, rows: Tensor, layout: Layout, values: Tensor) -> StoredRows:
        blocks, coordinate = Blocks(layout), coordinate_scale(rows, layout, self.damping)
        inverse, scale = _inverse(coordinate), torch.empty(len(rows), len(layout))
        for piece, scratch in _pieces(rows):
            whitened = torch.mul(rows[piece], inverse, out=scratch)
            usual = self._scale(whitened, blocks)
            finite = usual.isfinite()
            scale[piece] = torch.where(usual >= TINY, usual, 0.0).masked_fill_(~finite, torch.nan)
            blocks.scale(whitened, _inverse(scale[piece]))
            if not finite.all():
                whitened.nan_to_num_(0.0, 0.0, 0.0)
            self._write(whitened, values[piece])
        return StoredRows(values, scale, coordinate)

    @abstractmethod
    def _scale(self, whitened: Tensor, blocks: Blocks) -> Tensor:
        """The scale ``[n, modules]`` of ``whitened`` rows ``[n, width]``."""

    @abstractmethod
    def _write(self, numbers: Tensor, values: Tensor) -> None:
        """Round ``numbers [n, width]``, divided by their scales, and put them into ``values``."""


class Int8(_Quantised):
    """Whole numbers from -127 to 127, the largest of each row and module at an end.

    A number's rounding error is at most half a unit: half its row's scale times its coordinate's.
    """

    name = "int8"
    dtype = torch.int8
    data_type = "int8"
    fill_value = -128  # never stored
    damping = 0.1

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "decode": "value * scale * coordinate_scale"}

    def _scale(self, whitened: Tensor, blocks: Blocks) -> Tensor:
        return blocks.largest(whitened) / 127

    def _write(self, numbers: Tensor, values: Tensor) -> None:
        values.copy_(numbers.round_())


class _Packed(_Quantised):
    """Several numbers in a byte."""

    dtype = torch.uint8
    data_type = "uint8"
    fill_value = 0  # their scales are NaN there
    packed = True
    bits: ClassVar[int]
    """Bits of a number."""
    meaning: ClassVar[str]
    """What the bits stand for, to a Zarr reader."""

    def stored_width(self, width: int) -> int:
        return packed_width(width, self.bits)

    def attributes(self) -> dict[str, Any]:
        order = f"column c: byte c % w, {self.bits} bits from {self.bits} * (c // w) on, w = bytes of a row"
        return {**super().attributes(), "packing": order, "decode": f"{self.meaning} * scale * coordinate_scale"}

    def codes(self, stored: StoredRows, layout: Layout) -> Tensor:
        return self._signed(unpack(stored.values, self.bits, layout.width))

    @abstractmethod
    def _signed(self, numbers: Tensor) -> Tensor:
        """Codes, int8, from the bits, in place."""


class Int4(_Packed):
    """Whole numbers from -7 to 7, two in a byte; otherwise as int8."""

    name = "int4"
    bits = 4
    meaning = "(bits - 8)"
    damping = 0.1

    def _scale(self, whitened: Tensor, blocks: Blocks) -> Tensor:
        return blocks.largest(whitened) / 7

    def _write(self, numbers: Tensor, values: Tensor) -> None:
        # By way of int8, to which torch converts ten times as fast as to uint8.
        pack(numbers.round_().to(torch.int8).add_(8).view(torch.uint8), self.bits, values)

    def _signed(self, numbers: Tensor) -> Tensor:
        return numbers.view(torch.int8).sub_(8)


class Sign(_Packed):
    """One bit a number: its sign.

    The scale of a row and module is the mean magnitude of its numbers, each divided by its coordinate's root
    mean square: of all signs times one number a block these are the nearest to the row in that metric. Without
    damping, a coordinate that is 0 in all rows of a chunk comes back as 0.
    """

    name = "sign"
    bits = 1
    meaning = "(2 * bits - 1)"
    damping = 0.0

    def _scale(self, whitened: Tensor, blocks: Blocks) -> Tensor:
        return blocks.mean(whitened.abs())

    def _write(self, numbers: Tensor, values: Tensor) -> None:
        # The sign bit is the highest: several times as fast as a comparison.
        negative = (numbers.view(torch.int32) >> 31).to(torch.int8)
        pack(negative.add_(1).view(torch.uint8), self.bits, values)

    def _signed(self, numbers: Tensor) -> Tensor:
        return numbers.view(torch.int8).mul_(2).sub_(1)


def coordinate_scale(rows: Tensor, layout: Layout, damping: float) -> Tensor:
    """Root mean square of each coordinate of finite ``rows [n, width]``, ``[width]``, damped.

    Blocks are divided by their largest number before, so the scale is between 0 and 1. ``damping`` is a share of the
    module's mean square.
    """
    blocks, total = Blocks(layout), torch.zeros(layout.width)
    for piece, scratch in _pieces(rows):
        shapes = scratch.copy_(rows[piece])
        largest = blocks.largest(shapes)
        usable = largest.isfinite() & (largest >= TINY)
        blocks.scale(shapes, torch.where(usable, 1 / largest, 0.0))
        if not usable.all():
            shapes.nan_to_num_(0.0, 0.0, 0.0)
        total += shapes.square_().sum(0)
    moment = total / max(1, len(rows))
    for block in layout:
        moment[block.columns] += damping * moment[block.columns].mean()
    return torch.where(moment >= TINY, moment, 0.0).sqrt()


def _inverse(scale: Tensor) -> Tensor:
    """1 / ``scale``, and 0 where that is not positive."""
    return torch.where(scale > 0, 1 / scale, 0.0)


def _pieces(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive rows, and memory ``[n, width]`` for as many: the same again and again."""
    step = piece_rows(rows.shape[1])
    scratch = torch.empty(min(step, len(rows)), rows.shape[1])
    for start in range(0, len(rows), step):
        yield slice(start, start + step), scratch[: len(rows) - start]
