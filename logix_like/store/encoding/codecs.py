"""Lossless compression of chunks of gradients, by codecs that every Zarr v3 reader has.

Kept are those that pay on real gradients (``tests/bench/test_encodings.py`` prints the figures): bfloat16 bits
shrink to .73 with their bits shuffled and lz4, and zstd gains nothing over that; int4 codes, most of which are small,
shrink to .78 with zstd and to nothing with lz4. An uncompressed chunk is mapped and costs no time to read, so that
is the default.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from logix_like.errors import ConfigError


class Codec(ABC):
    """Makes the bytes of a chunk fewer, and gives them back."""

    name: ClassVar[str]
    """What the config and the commit record call it."""

    @abstractmethod
    def metadata(self, itemsize: int) -> list[dict[str, Any]]:
        """Zarr's metadata of the codec for numbers of ``itemsize`` bytes; empty for none."""

    @abstractmethod
    def encode(self, data: np.ndarray, itemsize: int) -> bytes | np.ndarray:
        """Compress ``data``, uint8."""

    @abstractmethod
    def decode(self, data: np.ndarray, size: int) -> np.ndarray:
        """The bytes again, uint8 ``[size]``; ValueError for anything that is not the compression of as many."""


class Uncompressed(Codec):
    """The bytes as they are: a chunk can be mapped."""

    name = "none"

    def metadata(self, itemsize: int) -> list[dict[str, Any]]:
        return []

    def encode(self, data: np.ndarray, itemsize: int) -> np.ndarray:
        return data

    def decode(self, data: np.ndarray, size: int) -> np.ndarray:
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes, expected {size}")
        return data


class BloscLz4(Codec):
    """Blosc with its bits shuffled, then lz4: fast, for numbers of two bytes and more."""

    name = "blosc-lz4"

    def metadata(self, itemsize: int) -> list[dict[str, Any]]:
        shuffled = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "typesize": itemsize, "blocksize": 0}
        return [{"name": "blosc", "configuration": shuffled}]

    def encode(self, data: np.ndarray, itemsize: int) -> bytes:
        from numcodecs.blosc import Blosc

        return bytes(Blosc("lz4", clevel=5, shuffle=Blosc.BITSHUFFLE, typesize=itemsize).encode(data))

    def decode(self, data: np.ndarray, size: int) -> np.ndarray:
        from numcodecs.blosc import Blosc

        if _number(data, 12, 4) != len(data):  # blosc does not look where its input ends
            raise ValueError(f"it declares {_number(data, 12, 4)} compressed bytes and has {len(data)}")
        return _decode(Blosc(), data, size, declared=_number(data, 4, 4))


class Zstd(Codec):
    """Zstandard at its fastest level: for codes of a byte and less."""

    name = "zstd"

    def metadata(self, itemsize: int) -> list[dict[str, Any]]:
        return [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}]

    def encode(self, data: np.ndarray, itemsize: int) -> bytes:
        from numcodecs.zstd import Zstd as Numcodec

        return bytes(Numcodec(level=1).encode(data))

    def decode(self, data: np.ndarray, size: int) -> np.ndarray:
        from numcodecs.zstd import Zstd as Numcodec

        return _decode(Numcodec(), data, size, declared=_zstd_size(data))


UNCOMPRESSED = Uncompressed()
CODECS: Mapping[str, Codec] = MappingProxyType({codec.name: codec for codec in (UNCOMPRESSED, BloscLz4(), Zstd())})
"""Codecs by the name that the config gives them."""


def codec_named(name: str) -> Codec:
    """The codec called ``name``; :class:`ConfigError` lists the known ones."""
    if name not in CODECS:
        raise ConfigError(f"unknown store codec {name!r}; known: {', '.join(CODECS)}")
    return CODECS[name]


def _decode(codec: Any, data: np.ndarray, size: int, declared: int) -> np.ndarray:
    """Decompress, once the size that the data declares is the expected one: no memory is taken on its word."""
    if declared != size:
        raise ValueError(f"it declares {declared} bytes, expected {size}")
    out = np.empty(size, np.uint8)
    try:
        codec.decode(data, out=out)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return out


def _zstd_size(data: np.ndarray) -> int:
    """The content size in the header of a zstd frame (RFC 8878, 3.1.1.1), -1 if it has none."""
    flags = _number(data, 4, 1)
    single, dictionary = flags >> 5 & 1, (0, 1, 2, 4)[flags & 3]
    length = (single, 2, 4, 8)[flags >> 6]
    if not length:
        return -1
    return _number(data, 6 - single + dictionary, length) + (256 if length == 2 else 0)


def _number(data: np.ndarray, start: int, length: int) -> int:
    if len(data) < start + length:
        raise ValueError(f"it has only {len(data)} bytes")
    return int.from_bytes(data[start : start + length].tobytes(), "little")
