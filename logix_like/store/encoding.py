"""How the numbers of a row are kept: stored type, and a scale by row and module where one is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from logix_like.errors import ConfigError
from logix_like.layout import Layout


class Encoding(ABC):
    """Turns rows into stored numbers and back."""

    name: ClassVar[str]
    """What the config and the manifest call it."""
    dtype: ClassVar[torch.dtype]
    """Type of the stored numbers, as torch sees them."""
    staging: ClassVar[torch.dtype] = torch.float32
    """Type in which rows wait to be encoded, and in which they are decoded."""
    data_type: ClassVar[str]
    """Zarr's name of the stored type."""
    fill_value: ClassVar[Any] = "NaN"
    """What a Zarr reader sees where a chunk is missing: never a number."""
    scaled: ClassVar[bool] = False
    """Whether each row and module has a scale."""

    @abstractmethod
    def encode(self, rows: Tensor, layout: Layout, values: Tensor) -> Tensor | None:
        """Write ``rows [n, width]`` of ``staging`` type into ``values [n, width]`` of type ``dtype``.

        Returns the scales ``[n, modules]``, float32, or None.
        """

    @abstractmethod
    def decode(self, values: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
        """The rows ``[n, width]`` again, of ``staging`` type; always a new tensor."""


class _Cast(Encoding):
    """A plain change of type, rounding to nearest."""

    def encode(self, rows: Tensor, layout: Layout, values: Tensor) -> None:
        values.copy_(rows)

    def decode(self, values: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
        return values.to(self.staging, copy=True)


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

    def encode(self, rows: Tensor, layout: Layout, values: Tensor) -> Tensor:
        largest = _largest(rows, layout)
        exponent = torch.frexp(largest).exponent - 15
        usable = largest.isfinite() & (largest > 0)
        # Below 2^-126 a float32 scale would itself lose bits, and its inverse overflow.
        exponent = torch.where(usable, exponent, 0).clamp_min(-126)
        scale = torch.ldexp(torch.ones_like(largest), exponent)
        values.copy_(_scale(rows.clone(), 1 / scale, layout))  # powers of two: multiplying is as exact as dividing
        return scale

    def decode(self, values: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
        if scale is None:
            raise ValueError("float16 rows are decoded with their scales")
        return _scale(values.to(self.staging), scale, layout)


class Int8(Encoding):
    """Whole numbers from -127 to 127 times a scale for each row and module: the block's largest is 127.

    The rounding error of a number is at most half its block's scale. A block that is not finite has the
    scale NaN, and so has a chunk that a Zarr reader misses.
    """

    name = "int8"
    dtype = torch.int8
    data_type = "int8"
    fill_value = -128  # never stored; its scale is NaN
    scaled = True

    def encode(self, rows: Tensor, layout: Layout, values: Tensor) -> Tensor:
        largest = _largest(rows, layout)
        # Below the smallest normal number the scale would lose bits; such a block is zero for any purpose.
        scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
        scale.masked_fill_(~largest.isfinite(), torch.nan)
        values.copy_(_scale(rows.clone(), 1 / scale, layout).round_().nan_to_num_(0.0).clamp_(-127, 127))
        return scale

    def decode(self, values: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
        if scale is None:
            raise ValueError("int8 rows are decoded with their scales")
        return _scale(values.to(self.staging), scale, layout)


def _largest(rows: Tensor, layout: Layout) -> Tensor:
    """Largest magnitude of each row and module, ``[n, modules]``."""
    if _alike(layout):
        return rows.reshape(len(rows), len(layout), -1).abs().amax(2)
    return torch.stack([rows[:, block.columns].abs().amax(1) for block in layout], dim=1)


def _scale(rows: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    """Multiply each module's columns of ``rows [n, width]`` by its column of ``scale [n, modules]``, in place."""
    if _alike(layout):
        rows.view(len(rows), len(layout), -1).mul_(scale.unsqueeze(2))
        return rows
    for column, block in enumerate(layout):
        rows[:, block.columns] *= scale[:, column : column + 1]
    return rows


def _alike(layout: Layout) -> bool:
    """Whether all blocks have the same size: one operation then does for all of them."""
    return len({block.size for block in layout}) == 1


ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {encoding.name: encoding for encoding in (BFloat16(), Float32(), Float64(), Float16(), Int8())}
)
"""Encodings by the name that the config gives them."""


def encoding_named(name: str) -> Encoding:
    """The encoding called ``name``; :class:`ConfigError` lists the known ones."""
    try:
        return ENCODINGS[name]
    except KeyError:
        known = ", ".join(ENCODINGS)
        raise ConfigError(f"unknown store dtype {name!r}; known: {known}") from None
