"""Zarr v3 arrays as this store uses them: whole chunks of rows, not compressed, checksummed.

A chunk of such an array is a plain file of numbers and a CRC-32C, so it is written and mapped
directly. The documents (``zarr.json``) are spelt out here rather than made through zarr-python:
its event loop cannot run while the interpreter exits (when the last rows are flushed), is
not safe across a fork, and costs a quarter of a second to import. That every array reads the same through
zarr-python is tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logix_like.errors import StoreDamagedError, StoreError
from logix_like.store.format.documents import sealed
from logix_like.store.format.schema import DOCUMENT, VIEWS, WRITERS, group_document
from logix_like.store.places.files import (
    CHECKSUM_BYTES,
    Bytes,
    Place,
    checksum,
    exists,
    is_out_of_reach,
    make_folder,
    out_of_reach,
    read_bytes,
    write_checked,
    write_file,
)

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_TEXT = {"name": "vlen-utf8", "configuration": {}}
_CRC = {"name": "crc32c"}


@dataclass(frozen=True)
class ArraySpec:
    """What does not change in an array while its rows grow."""

    data_type: str
    """Zarr's name of the type: ``uint16``, ``float32``, ``string`` and so on."""
    fill_value: Any
    """What a reader sees where there is no chunk."""
    width: int | None = None
    """Numbers of one row; None for an array of one dimension."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    compression: Sequence[Mapping[str, Any]] = ()
    """Zarr's metadata of the codecs between the numbers and their checksum."""
    of_chunks: bool = False
    """Whether it has one row for each chunk of the others, rather than for each of their rows."""

    def document(self, rows: int, chunk_rows: int) -> bytes:
        """The array's ``zarr.json`` for a part of ``rows`` rows in chunks of ``chunk_rows``."""
        if self.of_chunks:
            rows, chunk_rows = -(-rows // chunk_rows), 1
        tail = [] if self.width is None else [self.width]
        document = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [rows, *tail],
            "data_type": self.data_type,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk_rows, *tail]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": self.fill_value,
            "codecs": [_TEXT if self.data_type == "string" else _BYTES, *self.compression, _CRC],
            "attributes": dict(self.attributes),
        }
        return sealed(document)


def write_group(folder: Place, attributes: Mapping[str, Any] | None = None, *, sync: bool = False) -> None:
    """Make ``folder`` a Zarr group."""
    make_folder(folder, sync=sync)
    write_file(folder / DOCUMENT, [group_document(attributes)], sync=sync)


def write_document(folder: Place, spec: ArraySpec, rows: int, chunk_rows: int, *, sync: bool = False) -> None:
    """Make ``folder`` a Zarr array, or change its number of rows."""
    write_file(folder / DOCUMENT, [spec.document(rows, chunk_rows)], sync=sync)


def chunk_file(folder: Place, chunk: int, dimensions: int) -> Place:
    """The file of a chunk of whole rows."""
    return folder / chunk_name(chunk, dimensions)


def chunk_name(chunk: int, dimensions: int) -> str:
    """Its name, by Zarr's default key encoding with the separator ``.``.

    With the usual ``/`` each chunk would have a folder of its own: twice the inodes, and one more
    folder to be forced to the disk at each commit.
    """
    return ".".join(["c", str(chunk), *["0"] * (dimensions - 1)])


def write_array(folder: Place, spec: ArraySpec, rows: int, buffers: Iterable[Bytes], *, sync: bool) -> int:
    """Write an array of one chunk; returns its checksum."""
    file = chunk_file(folder, 0, 1 if spec.width is None else 2)
    crc = write_checked(file, buffers, sync=sync)
    write_document(folder, spec, rows, rows, sync=sync)
    return crc


def read_chunk(file: Place, what: str, *, size: int | None = None, crc: int | None = None) -> np.ndarray:
    """The bytes of a chunk, checked against its own CRC-32C, a size and a recorded CRC.

    ``what`` names the rows for the :class:`StoreDamagedError` that anything unexpected raises.
    """
    try:
        content = read_bytes(file)
    except OSError as error:
        raise unreadable(file, what, error) from error
    payload = len(content) - CHECKSUM_BYTES
    if payload < 0 or (size is not None and payload != size):
        expected = "" if size is None else f", expected {size + CHECKSUM_BYTES}"
        raise damaged(file, what, f"has {len(content)} bytes{expected}")
    data = np.frombuffer(content, np.uint8)
    stored = int.from_bytes(data[payload:].tobytes(), "little")
    if checksum(data[:payload]) != stored or (crc is not None and crc != stored):
        raise damaged(file, what, "does not match its checksum")
    return data[:payload]


def damaged(file: Place, what: str, finding: str) -> StoreDamagedError:
    """The error for a chunk file that is not what was committed."""
    return StoreDamagedError(
        f"{file}, which holds {what}, {finding}; the bytes are not those that were committed: {remedy(file)}"
    )


def remedy(file: Place) -> str:
    """What to do about a damaged file."""
    if f"/{VIEWS}/" in str(file):
        return "remove the folder of the sample view, it is made anew"
    further = ", leave it out (on_damage='skip'), or take it out of the store (logix-like repair)"
    return "restore the file from a copy" + (further if f"/{WRITERS}/" in str(file) else "")


def unreadable(file: Place, what: str, error: OSError) -> StoreError:
    """The error for a chunk file that the storage does not give: a merge takes files away, a network may be down."""
    if isinstance(error, FileNotFoundError) and f"/{WRITERS}/" in str(file) and not exists(file.parent):
        return StoreDamagedError(
            f"{file}, which holds {what}, is gone with its folder: if the store was merged since it was opened "
            "(logix-like compact), open it again or call refresh(); else restore the folder from a copy"
        )
    if is_out_of_reach(error):
        return out_of_reach(file, error)
    return damaged(file, what, f"cannot be read ({error.strerror or error})")
