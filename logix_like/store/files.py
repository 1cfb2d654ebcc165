"""The one place where bytes are read from and written to a disk.

Files are written under a temporary name and renamed, so that a name is never seen with half of
its bytes. What else a store needs (a record file that grows, mapped reading) is here too, so that
another kind of storage has one module to answer for.
"""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import google_crc32c
import numpy as np
import torch
from torch import Tensor

Bytes = bytes | bytearray | np.ndarray

CHECKSUM_BYTES = 4
_numbers = itertools.count()


def checksum(buffer: Bytes, start: int = 0) -> int:
    """CRC-32C of a buffer, going on from ``start``."""
    # The C extension refuses writable buffers other than arrays.
    return int(google_crc32c.extend(start, np.frombuffer(buffer, np.uint8) if len(buffer) else b""))


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a CPU tensor, ``uint8``, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def make_folder(folder: Path, *, sync: bool = False) -> None:
    """Create a folder and its parents; with ``sync`` their names are on the disk on return."""
    if folder.is_dir():
        return
    make_folder(folder.parent, sync=sync)
    folder.mkdir(exist_ok=True)
    if sync:
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk itself."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """A hidden name beside ``path`` that no other process or thread uses."""
    return path.with_name(f".{os.getpid()}-{next(_numbers)}.partial")


def write_file(path: Path, buffers: Iterable[Bytes], *, sync: bool = False) -> None:
    """Write the buffers, one after another, as the whole content of ``path``; atomic."""
    write_files({path: buffers}, sync=sync)


def write_files(contents: Mapping[Path, Iterable[Bytes]], *, sync: bool = False) -> None:
    """Write some files, each atomic and none seen before all are complete.

    With ``sync`` they are forced to the disk together: a journaling file system then commits twice
    for all of them (contents, names) where one after another would take two commits for each.
    """
    for folder in dict.fromkeys(path.parent for path in contents):
        make_folder(folder, sync=sync)
    temporary = {path: temporary_name(path) for path in contents}
    try:
        with ExitStack() as opened:
            files = [opened.enter_context(open(temporary[path], "wb")) for path in contents]
            for file, buffers in zip(files, contents.values(), strict=True):
                for buffer in buffers:
                    file.write(buffer.data if isinstance(buffer, np.ndarray) else buffer)
                file.flush()
            for file in files if sync else ():
                os.fsync(file.fileno())
        for path, name in temporary.items():
            os.replace(name, path)
    except BaseException:
        for name in temporary.values():
            name.unlink(missing_ok=True)
        raise
    for folder in dict.fromkeys(path.parent for path in contents) if sync else ():
        sync_folder(folder)


def write_checked(contents: Mapping[Path, Iterable[Bytes]], *, sync: bool = False) -> dict[Path, int]:
    """Write files with the CRC-32C of their content behind it, as Zarr's ``crc32c`` codec does; returns these."""
    totals = dict.fromkeys(contents, 0)

    def content(path: Path) -> Iterable[Bytes]:
        for buffer in contents[path]:
            totals[path] = checksum(buffer, totals[path])
            yield buffer
        yield totals[path].to_bytes(CHECKSUM_BYTES, "little")

    write_files({path: content(path) for path in contents}, sync=sync)
    return totals


def read_bytes(path: Path) -> bytearray:
    """The whole content of a file, writable, read without a second copy."""
    with open(path, "rb") as file:
        content = bytearray(os.fstat(file.fileno()).st_size)
        count = file.readinto(content)
    del content[count:]
    return content


def map_bytes(path: Path) -> mmap.mmap:
    """A private mapping of a file that is not empty; the file itself is opened for reading only."""
    with open(path, "rb") as file:
        # ACCESS_COPY gives a writable buffer (torch warns of others) that never reaches the file.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


class LineFile:
    """A file that grows by whole lines; one owner, closed by it."""

    def __init__(self, path: Path, *, sync: bool = False) -> None:
        self._sync = sync
        self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        if sync:
            sync_folder(path.parent)

    def append(self, line: bytes) -> None:
        """Add one line with a single write, so that a kill can only tear the last one."""
        written = self._file.write(line + b"\n")
        if written != len(line) + 1:
            raise OSError(f"only {written} of {len(line) + 1} bytes of a record were written")
        if self._sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()


def remove_tree(folder: Path) -> None:
    """Remove a folder that is ours; it disappears under its name at once."""
    aside = temporary_name(folder)
    try:
        os.replace(folder, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside)


def folder_size(folder: Path) -> int:
    """Sum of the sizes of all files below a folder (0 if there is none)."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # a temporary file of a live writer
    return total
