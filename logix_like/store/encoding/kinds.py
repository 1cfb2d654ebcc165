"""How the numbers of a row are kept: every encoding by the name that the config gives it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from logix_like.errors import ConfigError
from logix_like.store.encoding.base import Encoding, StoredRows
from logix_like.store.encoding.plain import BFloat16, Float16, Float32, Float64
from logix_like.store.encoding.quantised import Int4, Int8, Sign

__all__ = ["ENCODINGS", "Encoding", "StoredRows", "encoding_named", "encoding_of_means"]

ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {encoding.name: encoding for encoding in (BFloat16(), Float32(), Float64(), Float16(), Int8(), Int4(), Sign())}
)
"""Encodings by the name that the config gives them."""

_MEANS: Mapping[str, str] = MappingProxyType({"sign": "int4", "int4": "int8"})


def encoding_of_means(encoding: Encoding) -> Encoding:
    """How means of rows of ``encoding`` are kept: averaging makes more bits, until they no longer tell anything.

    (LDS of means of three visits, language models: of signs .652 kept as signs, .668 with 4 bits as with 8; of 4 bits
    .586 with 4, .588 with 8.)
    """
    return ENCODINGS[_MEANS.get(encoding.name, encoding.name)]


def encoding_named(name: str) -> Encoding:
    """The encoding called ``name``; :class:`ConfigError` lists the known ones."""
    try:
        return ENCODINGS[name]
    except KeyError:
        known = ", ".join(ENCODINGS)
        raise ConfigError(f"unknown store dtype {name!r}; known: {known}") from None
