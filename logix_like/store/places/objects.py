"""Stores in an object store (S3 and what speaks like it, this process's memory), by obstore.

A file is one object, a folder the prefix of some keys. A put is atomic, so that nothing is ever torn. Chunks are
created on the condition that there is none of their key; so is each record of what was committed, an object
``commits/<number>`` of one line. There is nothing to force to a disk: what a put has acknowledged is durable.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from logix_like.errors import StoreWriteError
from logix_like.store.places.lease import ObjectLease
from logix_like.store.places.storage import Anchor, Bytes, Files, ObjectPath, Pending, Records

if TYPE_CHECKING:
    import zarr
    from obstore.store import ObjectStore

PARALLEL = 16
"""Requests under way at a time where many small objects are read."""
CLAIM = "claimed"
"""The object by which a process makes a folder its own."""
DIGITS = 9
"""A record's number is padded to these, so that names sort as numbers do."""


class ObjectFiles(Files):
    """Objects of one bucket."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        """The bucket, as obstore sees it."""

    def make_folder(self, folder: ObjectPath, *, sync: bool = False) -> None:
        """Nothing to do: a folder is there when something is in it."""

    def claim_folder(self, folder: ObjectPath, *, sync: bool = False) -> bool:
        # The token makes this claim another one than an earlier claim of the same name.
        return self._create(folder / CLAIM, uuid.uuid4().hex.encode())

    def prepare(
        self, contents: Mapping[ObjectPath, Iterable[Bytes]], *, sync: bool = False, once: bool = False
    ) -> Pending:
        put = self.create if once else self._put
        return _PendingObjects(
            {path: b"".join(bytes(buffer) for buffer in buffers) for path, buffers in contents.items()}, put
        )

    def create(self, path: ObjectPath, content: bytes) -> None:
        """Create an object; what another process put there is not touched, and raises :class:`StoreWriteError`."""
        if not self._create(path, content) and bytes(self.read(path)) != content:
            raise StoreWriteError(
                f"{path} is there already with other content, though this process alone should write there; "
                "nothing was changed: give each run a project of its own"
            )

    def adopt(self, source: Path, path: ObjectPath) -> None:
        with _os_errors(path):
            obstore.put(self.store, path.key, source)
        source.unlink()

    def read(self, path: ObjectPath) -> bytearray:
        with _os_errors(path):
            return bytearray(obstore.get(self.store, path.key).bytes())

    def map(self, path: ObjectPath) -> bytearray:
        return self.read(path)

    def size(self, path: ObjectPath) -> int:
        with _os_errors(path):
            return int(obstore.head(self.store, path.key)["size"])

    def exists(self, path: ObjectPath) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return next(self._list(path), None) is not None
        return True

    def vacant(self, folder: ObjectPath) -> bool:
        return not self.exists(folder)

    def names(self, folder: ObjectPath) -> list[str]:
        with _os_errors(folder):
            found = obstore.list_with_delimiter(self.store, f"{folder.key}/" if folder.key else None)
        keys = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted(key.rstrip("/").rpartition("/")[2] for key in keys)

    def walk(self, folder: ObjectPath) -> Iterator[tuple[ObjectPath, int]]:
        for key, size in sorted(self._list(folder)):
            yield ObjectPath(folder.bucket, key, self), size

    def remove(self, folder: ObjectPath) -> None:
        """Remove all objects below ``folder``; those directly in it (its document) first, so that it is none."""
        keys = sorted((key for key, _ in self._list(folder)), key=lambda key: (key.count("/"), key))
        with _os_errors(folder):
            for key in keys[:1]:
                obstore.delete(self.store, key)
            obstore.delete(self.store, keys[1:])

    def move(self, source: ObjectPath, target: ObjectPath) -> None:
        """Copy all objects, then remove those of the source."""
        keys = [key for key, _ in self._list(source)] or [source.key]
        with _os_errors(source):
            for key in keys:
                obstore.copy(self.store, key, target.key + key.removeprefix(source.key))
            obstore.delete(self.store, keys)

    def identity(self, folder: ObjectPath) -> Hashable:
        try:
            with _os_errors(folder):
                return str(obstore.head(self.store, (folder / CLAIM).key)["e_tag"])
        except FileNotFoundError:
            return None

    def anchor(self, folder: ObjectPath) -> Anchor:
        return Anchor(folder)

    def records(self, path: ObjectPath, *, sync: bool = False) -> Records:
        return ObjectRecords(self, path)

    def read_records(self, path: ObjectPath) -> bytes:
        names = self.names(path)
        if not names:
            raise FileNotFoundError(f"{path} is not there")
        with ThreadPoolExecutor(PARALLEL) as pool:
            return b"".join(bytes(line) for line in pool.map(lambda name: self.read(path / name), names))

    def replace_records(self, path: ObjectPath, lines: Sequence[bytes]) -> None:
        """Put those that are to change, one after another: each is a line that is sound by itself."""
        wanted = {f"{number:0{DIGITS}d}": line + b"\n" for number, line in enumerate(lines)}
        known = {name: bytes(self.read(path / name)) for name in self.names(path)}
        for name, line in wanted.items():
            if known.get(name) != line:
                self._put(path / name, line)
        surplus = [(path / name).key for name in known if name not in wanted]
        if surplus:
            with _os_errors(path):
                obstore.delete(self.store, surplus)

    def zarr_group(self, folder: ObjectPath) -> zarr.Group:
        import zarr
        from zarr.storage import ObjectStore

        return zarr.open_group(ObjectStore(self.store, read_only=True), path=folder.key, mode="r", zarr_format=3)

    def stamp(self, path: ObjectPath) -> Hashable:
        with _os_errors(path):
            found = [entry for batch in obstore.list(self.store, f"{path.key}/") for entry in batch]
        return tuple(sorted((entry["path"], entry["e_tag"]) for entry in found)) or None

    def lock(self, store: ObjectPath, folder: ObjectPath, rank: int) -> ObjectLease:
        with _os_errors(folder):
            return ObjectLease(store, folder / f"{rank}.lock", self.store)

    def _put(self, path: ObjectPath, content: bytes) -> None:
        with _os_errors(path):
            obstore.put(self.store, path.key, content, use_multipart=False)

    def _create(self, path: ObjectPath, content: bytes) -> bool:
        try:
            with _os_errors(path):
                obstore.put(self.store, path.key, content, mode="create", use_multipart=False)
        except FileExistsError:
            return False
        return True

    def _list(self, folder: ObjectPath) -> Iterator[tuple[str, int]]:
        with _os_errors(folder):
            for batch in obstore.list(self.store, f"{folder.key}/" if folder.key else None):
                yield from ((entry["path"], entry["size"]) for entry in batch)


class _PendingObjects:
    """Objects that are still to be put."""

    def __init__(self, contents: dict[ObjectPath, bytes], put: Callable[[ObjectPath, bytes], None]) -> None:
        self._contents = contents
        self._put = put

    def publish(self) -> None:
        for path in list(self._contents):
            self._put(path, self._contents.pop(path))

    def discard(self) -> None:
        self._contents.clear()


class ObjectRecords:
    """Lines of a record, each an object of its own that is created and never changed."""

    def __init__(self, files: ObjectFiles, path: ObjectPath) -> None:
        self._files = files
        self._path = path
        self._count = 0

    def append(self, line: bytes) -> None:
        """Create the next object; what another writer put there is not touched."""
        self._files.create(self._path / f"{self._count:0{DIGITS}d}", line + b"\n")
        self._count += 1

    def close(self) -> None:
        """Nothing is held."""


@contextmanager
def _os_errors(path: ObjectPath) -> Iterator[None]:
    """What the storage refuses, as the errors that files give."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there") from None
    except AlreadyExistsError:
        raise FileExistsError(f"{path} is there already") from None
    except BaseError as error:
        raise OSError(f"{path}: {told(error)}") from error


def told(error: BaseException) -> str:
    """The first line of what obstore says; behind it stands the whole request."""
    return (str(error).splitlines() or [type(error).__name__])[0]
