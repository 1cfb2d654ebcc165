"""A disk whose power can be cut: stands in for :mod:`os` in the module that writes files, and knows what is forced."""

from __future__ import annotations

import fcntl
import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any


class PowerCut:
    """Forwards to :mod:`os`; of each file it knows the content, and of each folder the names, that were forced.

    Nothing else is on the disk after the power is cut, which is the worst that a file system may do. Files are told by
    numbers given at their creation, since those of the system come again.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._numbers = itertools.count()
        self._known: dict[int, int] = {}
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        self.on_sync: Callable[[], object] = bool
        """Called after each call that forces something to the disk."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str | Path, flags: int, mode: int = 0o777) -> int:
        """Number a file that is made."""
        new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
        handle = os.open(path, flags, mode)
        if new:
            self._number(os.fstat(handle), new=True)
        return handle

    def mkdir(self, path: str | Path) -> None:
        """Number a folder that is made."""
        os.mkdir(path)
        self._number(os.stat(path), new=True)

    def fsync(self, handle: int) -> None:
        """Force a file's content or a folder's names."""
        found, place = os.fstat(handle), Path(f"/proc/self/fd/{handle}")
        if stat.S_ISDIR(found.st_mode):
            entries = {name: os.lstat(place / name) for name in os.listdir(handle)}
            self._names[self._number(found)] = {
                name: (self._number(entry), stat.S_ISDIR(entry.st_mode)) for name, entry in entries.items()
            }
        else:
            # What is only read here was made by somebody else.
            read_only = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            self._contents[self._number(found, new=read_only)] = place.read_bytes()
        self.on_sync()

    def restored(self, target: Path) -> Path:
        """What is there once the power is back, at ``target``."""
        self._restore(self._number(os.stat(self._root)), target)
        return target

    def _restore(self, number: int, target: Path) -> None:
        target.mkdir()
        for name, (inner, folder) in self._names.get(number, {}).items():
            if folder:
                self._restore(inner, target / name)
            else:
                (target / name).write_bytes(self._contents.get(inner, b""))

    def _number(self, found: os.stat_result, *, new: bool = False) -> int:
        if new or found.st_ino not in self._known:
            self._known[found.st_ino] = next(self._numbers)
        return self._known[found.st_ino]
