"""One process for each rank: a lock that its holder's death releases."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from pathlib import Path

from logix_like.errors import StoreError
from logix_like.store.schema import WRITERS


class WriterLock:
    """Held from its making to :meth:`close` by a process that writes as ``rank``.

    It is a POSIX record lock on the empty file ``writers/<rank>.lock``: the kernel drops it when the process
    ends in whatever way, so that none is ever stale; forked children (data loaders) do not hold it on.
    Writers of one process do not exclude each other: each has a part of its own.

    Raises :class:`StoreError` when another process holds it. A file system without locks goes without.
    """

    def __init__(self, store: Path, rank: int) -> None:
        file = store / WRITERS / f"{rank}.lock"
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._release = weakref.finalize(self, os.close, handle)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self.close()
                raise StoreError(
                    f"another process writes to {store} as rank {rank} (it holds {file.name}); end it first, or "
                    "give each process a rank or a project of its own"
                ) from error

    def close(self) -> None:
        """Let another process in; idempotent."""
        self._release()
