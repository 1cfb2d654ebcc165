"""One writer for each rank: a lock that its holder's death releases."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from pathlib import Path

from logix_like.errors import StoreError

Holder = tuple[int, int, int]
"""Process, and the lock file's device and number."""

_held: set[Holder] = set()


class WriterLock:
    """Held from its making to :meth:`close` by a writer of ``rank``.

    It is a POSIX record lock on the empty file ``<rank>.lock``: the kernel drops it when the process
    ends in whatever way, so that none is ever stale; forked children (data loaders) do not hold it on. Such a
    lock does not exclude its own process, and any closing of the file drops it, so that the process also keeps
    a list of those that it holds.

    Raises :class:`StoreError` when it is held, by another process or this one. A file system without locks goes
    without.
    """

    def __init__(self, store: Path, file: Path, rank: int) -> None:
        holder = _holder(os.stat(file)) if file.exists() else None
        if holder in _held:  # looked at before the file is opened: closing it again would drop the lock
            raise StoreError(
                f"this process already writes to {store} as rank {rank}; end that run first (run.finalize()), or "
                "give this one a project of its own"
            )
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        holder = _holder(os.fstat(handle))
        self._handle, self._holder = handle, holder
        # First: wherever the rest is broken off, what was taken is given back once this is forgotten.
        self._finalizer = weakref.finalize(self, _release, handle, holder)
        _held.add(holder)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self.close()
                raise StoreError(
                    f"another process writes to {store} as rank {rank} (it holds {file.name}); end it first, or "
                    "give each process a rank or a project of its own"
                ) from error

    def require(self) -> None:
        """Nothing can take it over while this process lives."""

    def close(self) -> None:
        """Let another writer in; idempotent."""
        if self._finalizer.alive:
            _release(self._handle, self._holder)
            self._finalizer.detach()  # last: a closing that was broken off before is done again


def _holder(file: os.stat_result) -> Holder:
    return os.getpid(), file.st_dev, file.st_ino


def _release(handle: int, holder: Holder) -> None:
    if holder in _held:
        _held.discard(holder)
        os.close(handle)
