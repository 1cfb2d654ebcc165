"""A disk that fails: stands in for :mod:`os` in the module that writes files, and counts what it is asked to do."""

from __future__ import annotations

import errno
import os
from typing import Any

CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir")
"""What a writer asks of the system, and what can fail."""


class Killed(BaseException):
    """Ends the process that writes, as far as a test can: nothing more reaches the disk."""


class BrokenDisk:
    """Forwards to :mod:`os`; the ``n``-th call that writes (from 1) fails, and so do all behind it if ``dead``.

    With ``ENOSPC`` half of what was to be written is there before the disk is full, and it stays full.
    """

    def __init__(self, fail_at: int = 0, code: int = errno.ENOSPC, *, dead: bool = False) -> None:
        self._fail_at = fail_at
        self._code = code
        self._dead = dead
        self.calls = 0
        """Calls so far."""
        self.failed = ""
        """Which call failed."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "unlink" and self._dead:
            return lambda *_, **__: self._end() if self.failed else real
        return real if name not in CALLS else lambda *args, **more: self._call(name, real, *args, **more)

    def _call(self, name: str, real: Any, *args: Any, **more: Any) -> Any:
        self.calls += 1
        stays = self._dead or (self._code == errno.ENOSPC and name in ("open", "write", "mkdir"))
        if self.calls != self._fail_at and not (stays and self.failed):
            return None if name == "fsync" else real(*args, **more)  # no test cuts the power: counting it is enough
        first, self.failed = not self.failed, self.failed or name
        if first and name == "write" and self._code == errno.ENOSPC:
            return real(args[0], bytes(args[1])[: len(args[1]) // 2]) or self._end()
        return self._end()

    def _end(self) -> Any:
        if self._dead:
            raise Killed
        raise OSError(self._code, os.strerror(self._code))
