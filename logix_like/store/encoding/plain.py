"""Encodings that keep each number by itself: floating-point types."""

from __future__ import annotations

import torch
from torch import Tensor

from logix_like.layout import Layout
from logix_like.store.encoding.base import Blocks, Encoding, StoredRows


class _Cast(Encoding):
    """A plain change of type, rounding to nearest."""

    def encode(self, rows: Tensor, layout: Layout, values: Tensor) -> StoredRows:
        return StoredRows(values.copy_(rows))


class BFloat16(_Cast):
    """8 bits of precision, the range of float32; its bits are stored as ``uint16``."""

    name = "bfloat16"
    dtype = torch.bfloat16
    data_type = "uint16"
    fill_value = 0x7FC0  # the bits of NaN


class Float32(_Cast):
    """As computed."""

    name = "float32"
    dtype = torch.float32
    data_type = "float32"


class Float64(_Cast):
    """As computed in double precision; for checks against a reference."""

    name = "float64"
    dtype = torch.float64
    staging = torch.float64
    data_type = "float64"


class Float16(Encoding):
    """11 bits of precision; each row and module is scaled by a power of two.

    The largest number of a block is brought to between 2^14 and 2^15, so that gradients
    of any size keep their precision (a plain cast loses everything below 6e-8).
    """

    name = "float16"
    dtype = torch.float16
    data_type = "float16"
    scaled = True

    def encode(self, rows: Tensor, layout: Layout, values: Tensor) -> StoredRows:
        blocks = Blocks(layout)
        largest = blocks.largest(rows)
        exponent = torch.frexp(largest).exponent - 15
        usable = largest.isfinite() & (largest > 0)
        # Below 2^-126 a float32 scale would itself lose bits, and its inverse overflow.
        exponent = torch.where(usable, exponent, 0).clamp_min(-126)
        scale = torch.ldexp(torch.ones_like(largest), exponent)
        values.copy_(blocks.scale(rows.clone(), 1 / scale))  # powers of two: as exact as dividing
        return StoredRows(values, scale)
