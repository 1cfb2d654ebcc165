"""The seam between a store and where its bytes lie: what a kind of storage must be able to do.

A place is a :class:`~pathlib.Path` (a folder or a file of this machine) or an :class:`ObjectPath` (a key of an
object store). All modules of the store build places with ``/`` and hand them to the functions of
:mod:`logix_like.store.places.files`, which ask the place's :class:`Files`.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import zarr

Bytes = bytes | bytearray | np.ndarray
"""What is written."""

Content = bytearray | mmap.mmap
"""What is read: a writable buffer that never reaches the file."""


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A key of an object store, or all keys below it; spelt and joined as a path is."""

    bucket: str
    """The URL without a key: ``s3://bucket``."""
    key: str
    """The key, without slashes at its ends; empty for the whole bucket."""
    files: Files = field(compare=False, repr=False)
    """The storage that holds it."""

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.bucket, f"{self.key}/{name}" if self.key else name, self.files)

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    @property
    def name(self) -> str:
        """The part behind the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without what follows its last dot."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def parent(self) -> ObjectPath:
        """The place that this one is in."""
        return ObjectPath(self.bucket, self.key.rpartition("/")[0], self.files)

    def exists(self) -> bool:
        """Whether there is an object of this key, or one below it."""
        return self.files.exists(self)


Place = Path | ObjectPath
"""Where something lies."""


class Records(Protocol):
    """A record of what was committed, which grows by whole lines."""

    def append(self, line: bytes) -> None:
        """Add one line; when this returns, it is there for every reader."""

    def close(self) -> None:
        """Let go of it; idempotent."""


class Pending(Protocol):
    """Files whose content is told and whose names are not there yet."""

    def publish(self) -> None:
        """Have every reader see them, each whole; where they were to be forced to the disk they are on return."""

    def discard(self) -> None:
        """Give up what was not published; idempotent."""


class Lock(Protocol):
    """Held by the one writer of a rank."""

    def require(self) -> None:
        """Raise :class:`StoreWriteError` when another writer has taken it over."""

    def close(self) -> None:
        """Let another writer in; idempotent."""


@dataclass(eq=False)
class Anchor:
    """A way to a folder for as long as it is written to."""

    place: Any
    """The folder."""
    close: Callable[[], object] = bool
    """Gives it up; idempotent."""


class Files(ABC):
    """One kind of storage. What is missing raises FileNotFoundError, all else that fails an OSError."""

    @abstractmethod
    def make_folder(self, folder: Any, *, sync: bool = False) -> None:
        """Create a folder and its parents; with ``sync`` their names are on the disk on return."""

    @abstractmethod
    def claim_folder(self, folder: Any, *, sync: bool = False) -> bool:
        """Create a folder that nobody else has created; False if someone did."""

    @abstractmethod
    def prepare(self, contents: Mapping[Any, Iterable[Bytes]], *, sync: bool = False, once: bool = False) -> Pending:
        """Take in the content of some files; on return its buffers may change.

        ``once`` says that none of the files may be there yet (storage that can, checks).
        """

    @abstractmethod
    def adopt(self, source: Path, path: Any) -> None:
        """Make the local file ``source``, which this takes over, the content of ``path``; durable on return."""

    @abstractmethod
    def read(self, path: Any) -> bytearray:
        """The whole content of a file."""

    @abstractmethod
    def map(self, path: Any) -> Content:
        """The content of a file, without reading it where that is possible."""

    @abstractmethod
    def size(self, path: Any) -> int:
        """Bytes of a file."""

    @abstractmethod
    def exists(self, path: Any) -> bool:
        """Whether there is a file or a folder."""

    @abstractmethod
    def vacant(self, folder: Any) -> bool:
        """Whether there is nothing, or an empty folder."""

    @abstractmethod
    def names(self, folder: Any) -> list[str]:
        """What is in a folder, sorted; empty where there is none."""

    @abstractmethod
    def walk(self, folder: Any) -> Iterator[tuple[Any, int]]:
        """All files below a folder with their sizes."""

    @abstractmethod
    def remove(self, folder: Any) -> None:
        """Remove a folder that is ours, with everything in it; nothing where there is none."""

    @abstractmethod
    def move(self, source: Any, target: Any) -> None:
        """Give a file or a folder another name, in a folder that there may not be yet."""

    @abstractmethod
    def identity(self, folder: Any) -> Hashable:
        """Tells a folder from another one that has taken its place; None where there is none."""

    @abstractmethod
    def anchor(self, folder: Any) -> Anchor:
        """A way to the same folder that never leads to another one of its name, where that is possible."""

    @abstractmethod
    def records(self, path: Any, *, sync: bool = False) -> Records:
        """The record at ``path``, to append to."""

    @abstractmethod
    def read_records(self, path: Any) -> bytes:
        """All lines of the record at ``path``."""

    @abstractmethod
    def replace_records(self, path: Any, lines: Sequence[bytes]) -> None:
        """Put other lines in the place of all those of the record at ``path``; durable on return."""

    @abstractmethod
    def zarr_group(self, folder: Any) -> zarr.Group:
        """The Zarr group in ``folder``, read-only."""

    @abstractmethod
    def stamp(self, path: Any) -> Hashable:
        """Changes whenever the record at ``path`` does, and is had without reading it; None where there is none."""

    @abstractmethod
    def lock(self, store: Any, folder: Any, rank: int) -> Lock:
        """Become the one writer of a rank; :class:`StoreError` while there is another."""
