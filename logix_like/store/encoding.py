"""How the numbers of a row are kept: every encoding by the name that the config gives it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from logix_like.errors import ConfigError
from logix_like.store.encoding_base import Encoding, StoredRows
from logix_like.store.plain import BFloat16, Float16, Float32, Float64
from logix_like.store.quantised import Int4, Int8, Sign

__all__ = ["ENCODINGS", "Encoding", "StoredRows", "encoding_named"]

ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {encoding.name: encoding for encoding in (BFloat16(), Float32(), Float64(), Float16(), Int8(), Int4(), Sign())}
)
"""Encodings by the name that the config gives them."""


def encoding_of_means(encoding: Encoding) -> Encoding:
    """How means of rows of ``encoding`` are kept: of a few bits a number, averaging makes more."""
    return ENCODINGS["int8"] if encoding.packed else encoding


def encoding_named(name: str) -> Encoding:
    """The encoding called ``name``; :class:`ConfigError` lists the known ones."""
    try:
        return ENCODINGS[name]
    except KeyError:
        known = ", ".join(ENCODINGS)
        raise ConfigError(f"unknown store dtype {name!r}; known: {known}") from None
