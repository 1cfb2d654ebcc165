"""What a row carries besides its gradient: ids, numbers and the user's metadata, in bytes and back."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from numbers import Integral
from urllib.parse import quote

import numpy as np

from logix_like.errors import StoreDamagedError, StoreError
from logix_like.layout import DataId

Value = str | int | float | None
"""A value of a metadata column; None where a row was logged without it."""

NAME_BYTES = 255
"""No file system takes a longer name."""


def id_text(data_id: DataId) -> tuple[str, bool]:
    """An id as text, and whether it is an int; :class:`StoreError` for anything else."""
    if type(data_id) is int:
        return str(data_id), True
    if isinstance(data_id, str):
        _require_utf8(data_id)
        return str(data_id), False
    if isinstance(data_id, Integral):
        return str(int(data_id)), True
    raise StoreError(
        f"a sample's id is {data_id!r} of type {type(data_id).__name__}, expected str or int; "
        "give each sample a name or a number"
    )


def value_text(value: object) -> str:
    """A metadata value as a JSON scalar; :class:`StoreError` for what is no str, int or float."""
    if hasattr(value, "item"):
        value = value.item()  # a scalar of numpy or torch
    if isinstance(value, str):
        _require_utf8(value)
    elif value is not None and not isinstance(value, int | float):
        raise StoreError(f"a metadata value is {value!r} of type {type(value).__name__}, expected str, int or float")
    return json.dumps(value, ensure_ascii=False)


def require_column_name(name: object) -> None:
    """Raise :class:`StoreError` unless ``name`` can be that of a metadata column, and so of a folder."""
    if not isinstance(name, str):
        raise StoreError(f"a metadata column is called {name!r} of type {type(name).__name__}, expected a str")
    _require_utf8(name)
    if name in ("", ".", "..") or "/" in name or len(quote(name, safe="")) > NAME_BYTES:
        raise StoreError(
            f"a metadata column cannot be called {name!r}: its name becomes a folder's; give it one without '/', of "
            f"1 to {NAME_BYTES} letters (fewer where they are not ASCII), other than '.' and '..'"
        )


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"the text {text!r} cannot be written as UTF-8 ({error.reason})") from error


def encode_texts(texts: Sequence[str]) -> bytes:
    """One chunk of Zarr's ``vlen-utf8`` codec: count, then length and bytes of each text."""
    parts = [struct.pack("<I", len(texts))]
    for text in texts:
        data = text.encode()
        parts += (struct.pack("<I", len(data)), data)
    return b"".join(parts)


def decode_texts(chunk: np.ndarray, rows: int, what: str) -> np.ndarray:
    """The texts of such a chunk, an object array ``[rows]`` of str."""
    from numcodecs.vlen import VLenUTF8

    count = int.from_bytes(chunk[:4].tobytes(), "little")
    if count != rows:  # which the codec would make room for on its word
        raise StoreDamagedError(f"{what}: found {count} texts, expected {rows}; restore the part from a copy")
    try:
        return np.asarray(VLenUTF8().decode(chunk), dtype=object)
    except (ValueError, UnicodeDecodeError) as error:
        raise StoreDamagedError(
            f"{what}: the texts cannot be decoded: {error}; restore the part from a copy"
        ) from error


def decode_ids(texts: np.ndarray, integer: np.ndarray) -> np.ndarray:
    """Ids of their own types from their texts ``[n]`` and a mask ``[n]`` of those that are ints."""
    ids = texts.copy()
    try:
        ids[integer] = [int(text) for text in texts[integer]]
    except ValueError as error:
        raise StoreDamagedError(f"an id is marked as a number and is none: {error}") from error
    return ids


def decode_values(texts: np.ndarray, name: str) -> np.ndarray:
    """Metadata values, an object array ``[n]``, from their JSON scalars (one parse for all)."""
    try:
        values = json.loads(f"[{','.join(texts)}]")
    except (ValueError, RecursionError) as error:
        raise StoreDamagedError(f"metadata column {name!r} cannot be read: {error}; restore it from a copy") from error
    if len(values) != len(texts) or any(isinstance(value, list | dict) for value in values):
        raise StoreDamagedError(f"metadata column {name!r} holds what is no value of a row; restore it from a copy")
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
