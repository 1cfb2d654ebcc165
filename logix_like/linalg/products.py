"""How precisely float32 matrices are multiplied, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

Precision = Literal["highest", "high", "medium"]
"""As in ``torch.set_float32_matmul_precision``: ``highest`` float32, ``high`` TensorFloat32 where the device has it,
``medium`` bfloat16 factors with float32 sums."""
PRECISIONS: tuple[str, ...] = get_args(Precision)
"""All of them."""


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Products of float32 matrices inside have ``precision``; afterwards that which was set before."""
    before = torch.get_float32_matmul_precision()
    if before == precision:
        yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
