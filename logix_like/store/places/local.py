"""Stores in a folder of this machine.

Files are written under a temporary name and renamed, so that a name is never seen with half of its bytes.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import shutil
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from logix_like.store.places.lock import WriterLock
from logix_like.store.places.storage import Anchor, Bytes, Content, Files, Pending, Records

if TYPE_CHECKING:
    import zarr

_numbers = itertools.count()
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class LocalFiles(Files):
    """Files and folders."""

    def make_folder(self, folder: Path, *, sync: bool = False) -> None:
        if folder.is_dir():
            return
        self.make_folder(folder.parent, sync=sync)
        with suppress(FileExistsError):
            os.mkdir(folder)
        if sync:
            sync_folder(folder.parent)

    def claim_folder(self, folder: Path, *, sync: bool = False) -> bool:
        try:
            os.mkdir(folder)
        except FileExistsError:
            return False
        if sync:
            sync_folder(folder.parent)
        return True

    def prepare(self, contents: Mapping[Path, Iterable[Bytes]], *, sync: bool = False, once: bool = False) -> Pending:
        """Write files under temporary names."""
        for folder in dict.fromkeys(path.parent for path in contents):
            self.make_folder(folder, sync=sync)
        pending = _PendingFiles(sync=sync)
        try:
            for path, buffers in contents.items():
                pending.add(path, buffers)
        except BaseException:
            pending.discard()
            raise
        return pending

    def adopt(self, source: Path, path: Path) -> None:
        handle = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(source, path)
        sync_folder(path.parent)

    def read(self, path: Path) -> bytearray:
        """The content of a file, read without a second copy."""
        with open(path, "rb") as file:
            content = bytearray(os.fstat(file.fileno()).st_size)
            count = file.readinto(content)
        del content[count:]
        return content

    def map(self, path: Path) -> Content:
        """A private mapping of a file; the file itself is opened for reading only."""
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return bytearray()
            # ACCESS_COPY gives a writable buffer (torch warns of others) that never reaches the file.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def size(self, path: Path) -> int:
        return os.stat(path).st_size

    def exists(self, path: Path) -> bool:
        return path.exists()

    def vacant(self, folder: Path) -> bool:
        return not folder.exists() or (folder.is_dir() and not os.listdir(folder))

    def names(self, folder: Path) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, folder: Path) -> Iterator[tuple[Path, int]]:
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                file = Path(parent, name)
                with suppress(FileNotFoundError):  # a temporary file of a live writer
                    yield file, os.lstat(file).st_size

    def remove(self, folder: Path) -> None:
        """Remove a folder, which disappears under its name at once."""
        aside = temporary_name(folder)
        try:
            os.replace(folder, aside)
        except FileNotFoundError:
            return
        try:
            shutil.rmtree(aside)
        except OSError:  # a writer that has the folder open may have put a last file into it
            shutil.rmtree(aside)

    def move(self, source: Path, target: Path) -> None:
        self.make_folder(target.parent, sync=True)
        os.rename(source, target)
        sync_folder(target.parent)
        sync_folder(source.parent)

    def identity(self, folder: Path) -> Hashable:
        try:
            found = os.stat(folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_dev, found.st_ino

    def anchor(self, folder: Path) -> Anchor:
        """The folder by an open handle of it, where the system has names for those (Linux)."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened = Path(f"/proc/self/fd/{handle}")
        anchor = Anchor(opened if opened.is_dir() else folder)
        anchor.close = weakref.finalize(anchor, os.close, handle)
        return anchor

    def records(self, path: Path, *, sync: bool = False) -> Records:
        return LineFile(path, sync=sync)

    def read_records(self, path: Path) -> bytes:
        return bytes(self.read(path))

    def replace_records(self, path: Path, lines: Sequence[bytes]) -> None:
        self.prepare({path: [line + b"\n" for line in lines]}, sync=True).publish()

    def zarr_group(self, folder: Path) -> zarr.Group:
        import zarr

        return zarr.open_group(folder, mode="r", zarr_format=3)

    def stamp(self, path: Path) -> Hashable:
        return file_stamp(path)

    def lock(self, store: Path, folder: Path, rank: int) -> WriterLock:
        return WriterLock(store, folder / f"{rank}.lock", rank)


class LineFile:
    """A file that grows by whole lines; one owner, closed by it."""

    def __init__(self, path: Path, *, sync: bool = False) -> None:
        self._sync = sync
        self._handle: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        if sync:
            sync_folder(path.parent)

    def append(self, line: bytes) -> None:
        """Add one line with a single write, so that a kill can only tear the last one."""
        if self._handle is None:
            raise OSError(errno.EBADF, "the record is closed")
        written = os.write(self._handle, line + b"\n")
        if written != len(line) + 1:
            told = f"only {written} of {len(line) + 1} bytes of a record were written"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {told}")
        if self._sync:
            os.fsync(self._handle)

    def close(self) -> None:
        """Close the file; idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


class _PendingFiles:
    """Files under temporary names, open until they are published.

    With ``sync`` they are forced to the disk together: a journaling file system then commits twice
    for all of them (contents, names) where one after another would take two commits for each.
    """

    def __init__(self, *, sync: bool) -> None:
        self._sync = sync
        self._temporary: dict[Path, Path] = {}
        self._handles: list[int] = []

    def add(self, path: Path, buffers: Iterable[Bytes]) -> None:
        """Write one more file."""
        name = temporary_name(path)
        self._handles.append(os.open(name, _NEW, 0o666))
        self._temporary[path] = name
        for buffer in buffers:
            _write(self._handles[-1], buffer)

    def publish(self) -> None:
        folders = dict.fromkeys(path.parent for path in self._temporary)
        try:
            for handle in self._handles if self._sync else ():
                os.fsync(handle)
            for path in list(self._temporary):
                os.replace(self._temporary[path], path)
                del self._temporary[path]
        finally:
            self.discard()
        for folder in folders if self._sync else ():
            sync_folder(folder)

    def discard(self) -> None:
        while self._handles:
            os.close(self._handles.pop())
        for name in self._temporary.values():
            with suppress(OSError):
                os.unlink(name)
        self._temporary.clear()


def _write(handle: int, buffer: Bytes) -> None:
    rest = memoryview(buffer.data if isinstance(buffer, np.ndarray) else buffer)
    while rest:
        rest = rest[os.write(handle, rest) :]


def file_stamp(path: str | Path) -> Hashable:
    """Changes whenever a file or its content does; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_items(path: str, numbers: np.ndarray, into: np.ndarray) -> None:
    """Read those of a file's items that ``numbers`` names into ``into``, their bytes; OSError where there are fewer."""
    size, places = len(into) // len(numbers), memoryview(into.data)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, number in zip(range(0, len(into), size), numbers.tolist(), strict=True):
            if os.preadv(handle, [places[start : start + size]], number * size) != size:
                raise OSError(errno.EIO, f"it ends before byte {(number + 1) * size}")
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk itself."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """A hidden name beside ``path`` that no other process or thread uses."""
    return path.with_name(f".{os.getpid()}-{next(_numbers)}.partial")


LOCAL = LocalFiles()
"""The folders of this machine."""
