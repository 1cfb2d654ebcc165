"""How much memory this process may take: what the machine has, or less where its container is given less."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

GROUPS, LIMITS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Where Linux tells a process's control groups, and what each may take."""


def allowed_memory(groups: Path = GROUPS, limits: Path = LIMITS) -> int | None:
    """Bytes; None where the system does not say."""
    return min([*_of_the_machine(), *_of_groups(groups, limits)], default=None)


def _of_the_machine() -> Iterator[int]:
    with suppress(AttributeError, ValueError, OSError):
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(groups: Path, limits: Path) -> Iterator[int]:
    """The limits of the process's groups and of all groups around them, in both versions of the file system."""
    with suppress(OSError, ValueError):
        for line in groups.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            folder, name = limits, "memory.max"
            if kinds:
                folder, name = limits / "memory", "memory.limit_in_bytes"
            if kinds and "memory" not in kinds.split(","):
                continue
            own = PurePosixPath(path.lstrip("/"))
            for group in (own, *own.parents):
                with suppress(OSError, ValueError):  # seen from a container it is not there; or the limit is "max"
                    yield int((folder / group / name).read_text())
