"""The one place through which a store's bytes are read and written, wherever they lie.

Each function asks the :class:`~logix_like.store.places.storage.Files` of the place it is given: folders of this
machine (:mod:`logix_like.store.places.local`) or an object store (:mod:`logix_like.store.places.objects`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from errno import EACCES, ECONNRESET, EMFILE, ENFILE, ENOMEM, EPERM, ESTALE, ETIMEDOUT
from os import PathLike
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from logix_like.errors import LogixError, StoreError, StoreWriteError
from logix_like.store.places.local import LOCAL, sync_folder, temporary_name
from logix_like.store.places.storage import Bytes, Content, Files, ObjectPath, Pending, Place

__all__ = ["Bytes", "Content", "Pending", "Place", "sync_folder", "temporary_name"]

CHECKSUM_BYTES = 4


def files_of(place: Place) -> Files:
    """The storage that holds a place."""
    return LOCAL if isinstance(place, Path) else place.files


def as_place(path: str | PathLike[str] | ObjectPath) -> Place:
    """What a user calls a store: a folder, made absolute, or the URL of one (``s3://bucket/key``).

    Raises :class:`ConfigError` for a URL that cannot be used, :class:`MissingDependencyError` where the package
    for object stores is missing.
    """
    if isinstance(path, ObjectPath):
        return path
    if ":/" in str(path):
        from logix_like.store.places.urls import place_of_url, require_no_url

        if isinstance(path, str) and "://" in path:
            return place_of_url(path)
        require_no_url(path)
    return Path(path).expanduser().absolute()  # once: where the process stands later changes nothing


@contextmanager
def named_errors(place: Place) -> Iterator[None]:
    """What the storage refuses while something is written to ``place``, as a :class:`StoreWriteError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LogixError):
            raise
        raise StoreWriteError(
            f"{place} could not be written to: {error}; what was committed before is safe: make room, or see to the "
            "storage and its permissions"
        ) from error


_OUT_OF_REACH = (None, EACCES, EPERM, EMFILE, ENFILE, ENOMEM, ESTALE, ETIMEDOUT, ECONNRESET)


def is_out_of_reach(error: OSError) -> bool:
    """Whether a file could not be read for a reason that says nothing of its bytes: permissions, the network, ..."""
    return not isinstance(error, FileNotFoundError) and error.errno in _OUT_OF_REACH


def out_of_reach(place: Place, error: OSError) -> StoreError:
    """The error for a file that is perhaps as it should be, and could not be read."""
    return StoreError(
        f"{place} could not be read ({error}); whether it is damaged is not known: see to its permissions, the network "
        "or the credentials in the environment, and ask again"
    )


def checksum(buffer: Bytes, start: int = 0) -> int:
    """CRC-32C of a buffer, going on from ``start``."""
    # The C extension refuses writable buffers other than arrays.
    return int(google_crc32c.extend(start, np.frombuffer(buffer, np.uint8) if len(buffer) else b""))


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a CPU tensor, ``uint8``, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def make_folder(folder: Place, *, sync: bool = False) -> None:
    """Create a folder and its parents; with ``sync`` their names are on the disk on return."""
    files_of(folder).make_folder(folder, sync=sync)


def write_file(path: Place, buffers: Iterable[Bytes], *, sync: bool = False) -> None:
    """Write the buffers, one after another, as the whole content of ``path``; atomic."""
    write_files({path: buffers}, sync=sync)


def write_files(contents: Mapping[Place, Iterable[Bytes]], *, sync: bool = False) -> None:
    """Write some files, each atomic; what was there before is replaced."""
    if contents:  # all in one storage
        files_of(next(iter(contents))).prepare(contents, sync=sync).publish()


def write_checked(file: Place, buffers: Iterable[Bytes], *, sync: bool = False) -> int:
    """Write a new file with the CRC-32C of its content behind it, as Zarr's ``crc32c`` codec does; returns that."""
    crc, pending = prepare_checked({file: buffers}, sync=sync)
    pending.publish()
    return crc[file]


def prepare_checked(
    contents: Mapping[Place, Iterable[Bytes]], *, sync: bool = False
) -> tuple[Mapping[Place, int], Pending]:
    """The same for some files, which get their names when they are published."""
    totals = dict.fromkeys(contents, 0)

    def content(path: Place) -> Iterable[Bytes]:
        for buffer in contents[path]:
            totals[path] = checksum(buffer, totals[path])
            yield buffer
        yield totals[path].to_bytes(CHECKSUM_BYTES, "little")

    files = files_of(next(iter(contents)))
    return totals, files.prepare({path: content(path) for path in contents}, sync=sync, once=True)


@contextmanager
def reached(place: Place) -> Iterator[None]:
    """What the storage refuses for a reason that says nothing of the bytes, as a :class:`StoreError` that says so."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LogixError) or not is_out_of_reach(error):
            raise
        raise out_of_reach(place, error) from error


def read_bytes(path: Place) -> bytearray:
    """The whole content of a file, writable."""
    with reached(path):
        return files_of(path).read(path)


def map_bytes(path: Place) -> Content:
    """The content of a file as a writable buffer that never reaches the file; mapped where that is possible."""
    with reached(path):
        return files_of(path).map(path)


def file_size(path: Place) -> int:
    """Bytes of a file."""
    return files_of(path).size(path)


def exists(path: Place) -> bool:
    """Whether there is a file or a folder."""
    return files_of(path).exists(path)


def read_records(path: Place) -> bytes:
    """All lines of a record."""
    with reached(path):
        return files_of(path).read_records(path)


def names_in(folder: Place) -> list[str]:
    """What is in a folder, sorted; empty where there is none."""
    return files_of(folder).names(folder)


def walk(folder: Place) -> Iterator[tuple[Place, int]]:
    """All files below a folder with their sizes."""
    return files_of(folder).walk(folder)


def remove_tree(folder: Place) -> None:
    """Remove a folder that is ours; it disappears under its name at once where that is possible."""
    files_of(folder).remove(folder)


def folder_size(folder: Place) -> int:
    """Sum of the sizes of all files below a folder (0 if there is none)."""
    return sum(size for _, size in walk(folder))
