"""One writer for each rank where the storage knows no locks: an object that its holder keeps renewing."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from logix_like.errors import StoreError, StoreWriteError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from logix_like.store.places.storage import ObjectPath

STALE_SECONDS = 90.0
"""A lease that was not renewed for this long is its holder's no more."""
RENEWALS = 4
"""How often it is renewed in that time."""


class ObjectLease:
    """Held from its making to :meth:`close`; the object ``<rank>.lock`` says by whom.

    A thread renews it. It is stale, and taken over, when its holder was a process of this machine that is gone, or
    has not renewed it for :data:`STALE_SECONDS`. No row depends on it, since every start writes to a part of its own
    whose objects are created conditionally: it only tells of a mistake early.

    Raises :class:`StoreError` while another writer holds it.
    """

    def __init__(self, store: ObjectPath, path: ObjectPath, bucket: ObjectStore) -> None:
        self._state = _State(store, path, bucket)
        self._state.take()
        thread = threading.Thread(target=self._state.renew, name="logix_like-lease", daemon=True)
        thread.start()
        self._release = weakref.finalize(self, _release, self._state, thread, os.getpid())

    def require(self) -> None:
        """Raise :class:`StoreWriteError` when another writer has taken it over."""
        if self._state.lost:
            raise StoreWriteError(
                f"another process took over writing {self._state.path}, since this one had not been heard of for "
                f"{STALE_SECONDS:.0f} seconds; what was committed is safe, nothing more is written"
            )

    def close(self) -> None:
        """Let another writer in; idempotent."""
        self._release()


class _State:
    """The object and what is known of it; shared with the thread that renews it."""

    def __init__(self, store: ObjectPath, path: ObjectPath, bucket: ObjectStore) -> None:
        self.path = path
        self.lost = False
        self.ended = threading.Event()
        self._store = store
        self._bucket = bucket
        self._token = uuid.uuid4().hex
        self._version: Any = None

    def take(self) -> None:
        """Create the object, or take it over from a holder that is gone."""
        try:
            self._put("create")
            return
        except AlreadyExistsError:
            pass
        found, version = self._read()
        if not _stale(found):
            raise StoreError(
                f"process {found.get('process')} on {found.get('host')} writes to {self._store} ({self.path.name}); "
                "end it first, or give each process a rank or a project of its own (of a machine that is gone, the "
                f"lock ends within {STALE_SECONDS:.0f} seconds)"
            )
        try:
            self._put(version)
        except (PreconditionError, AlreadyExistsError) as error:
            raise StoreError(f"another process began to write to {self._store} at the same moment") from error

    def renew(self) -> None:
        """Put the object anew from time to time until the end."""
        while not self.ended.wait(STALE_SECONDS / RENEWALS):
            try:
                self._put(self._version)
            except (PreconditionError, AlreadyExistsError, FileNotFoundError):
                self.lost = True
                return
            except (BaseError, OSError):
                continue  # the storage is not to be reached for the moment: chunks say so if it stays like that

    def release(self) -> None:
        """Remove the object if it is still ours."""
        with suppress(BaseError, OSError, ValueError):
            if self._read()[0].get("token") == self._token:
                obstore.delete(self._bucket, self.path.key)

    def _put(self, mode: Any) -> None:
        holder = {
            "token": self._token,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "renewed": time.time(),
        }
        put = obstore.put(self._bucket, self.path.key, json.dumps(holder).encode(), mode=mode)
        self._version = _version(put)

    def _read(self) -> tuple[dict[str, Any], Any]:
        found = obstore.get(self._bucket, self.path.key)
        version = _version(found.meta)
        try:
            holder = json.loads(bytes(found.bytes()))
        except ValueError:
            holder = {}
        return holder if isinstance(holder, dict) else {}, version


def _version(told: Any) -> dict[str, str]:
    """What tells the object as it is from what it may become, in the words of its storage."""
    return {name: told[name] for name in ("e_tag", "version") if told[name] is not None}


def _stale(holder: dict[str, Any]) -> bool:
    renewed = holder.get("renewed")
    if not isinstance(renewed, int | float) or time.time() - renewed > STALE_SECONDS:
        return True
    process = holder.get("process")
    if holder.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    return process > 0 and not _lives(process)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _release(state: _State, thread: threading.Thread, process: int) -> None:
    if os.getpid() == process:
        state.ended.set()
        if threading.current_thread() is not thread:  # which may be the one that collects a forgotten writer
            thread.join()
        state.release()
