"""Documents (``zarr.json``) and lines of records with a checksum of their own, so that a flipped bit is found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from logix_like.store.places.files import checksum

SEAL = "crc32c"
"""Attribute that holds the CRC-32C of the document without it, eight hex digits."""


def sealed(document: Mapping[str, Any]) -> bytes:
    """The document's bytes; its ``attributes`` carry a checksum of all the rest."""
    attributes = {key: value for key, value in document["attributes"].items() if key != SEAL}
    bare = {**document, "attributes": attributes}
    seal = f"{checksum(json.dumps(bare).encode()):08x}"
    return json.dumps({**bare, "attributes": attributes | {SEAL: seal}}).encode()


def unsealed(content: bytes | bytearray) -> dict[str, Any]:
    """The attributes of a document whose bytes are those that :func:`sealed` gave, else ValueError."""
    try:
        document = json.loads(content)
        intact = sealed(document) == bytes(content)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no document of this library ({error!r})") from error
    if not intact:
        raise ValueError("it does not match its checksum")
    attributes: dict[str, Any] = document["attributes"]
    return attributes


def sealed_line(entry: Mapping[str, Any]) -> bytes:
    """An entry of a record as a line, without its end: eight hex digits (CRC-32C of the rest), a blank, and JSON."""
    content = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s" % (checksum(content), content)


def unsealed_line(line: bytes) -> dict[str, Any]:
    """The entry of a line whose bytes are those that :func:`sealed_line` gave, else ValueError or RecursionError."""
    if line[:9] != b"%08x " % checksum(line[9:]):
        raise ValueError("its checksum does not match")
    entry: dict[str, Any] = json.loads(line[9:])
    return entry
