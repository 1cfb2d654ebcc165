"""Folders that someone reads, marked by a shared lock on the folder itself, so that nobody removes them."""

from __future__ import annotations

import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path

from logix_like.store.places.files import remove_tree
from logix_like.store.places.storage import Place


class FolderHold:
    """Keeps :func:`remove_unheld` off a folder until it is closed or forgotten.

    The kernel drops it when the process ends in whatever way. A file system without locks goes without.
    """

    def __init__(self, folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._release = weakref.finalize(self, os.close, handle)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)  # waits only while the folder is being removed

    def close(self) -> None:
        """Let the folder go; idempotent."""
        self._release()


def remove_unheld(folder: Place) -> bool:
    """Remove a folder unless someone holds it, or that cannot be told; returns whether it was removed.

    Object stores know no holds: whoever reads there finds out by an object that is missing.
    """
    if not isinstance(folder, Path):
        remove_tree(folder)
        return True
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_tree(folder)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
