"""Several small numbers in a byte, in planes.

With ``p`` numbers a byte, a row of ``width`` numbers takes ``w = ceil(width / p)`` bytes, and the number of column
``c`` lies in byte ``c % w``, in the ``8 / p`` bits from ``(c // w) * 8 / p`` on. So the lowest bits of all bytes are
the first ``w`` columns side by side, the next ones the ``w`` after them: a block of columns comes out with one shift
and one mask, with no interleaving, and a product can take the blocks one by one. Bits that are left over are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(width: int, bits: int) -> int:
    """Bytes of a row of ``width`` numbers of ``bits`` bits."""
    return -(-width // (8 // bits))


def pack(numbers: Tensor, bits: int, out: Tensor) -> None:
    """Put ``numbers [n, width]`` (uint8, below ``2 ** bits``) into the bytes ``out [n, packed width]``."""
    step = out.shape[1]
    out.copy_(numbers[:, :step])
    for plane in range(1, 8 // bits):
        columns = numbers[:, plane * step : (plane + 1) * step]
        out[:, : columns.shape[1]] |= columns << (plane * bits)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The numbers again, uint8 ``[n, width]``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    planes = (packed[:, None] >> shifts).bitwise_and_(2**bits - 1)
    return planes.flatten(1)[:, :width].contiguous()
