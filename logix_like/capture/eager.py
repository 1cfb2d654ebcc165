"""Compiled models run eagerly for as long as anybody asks for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch

_lock = threading.RLock()
_stance = ExitStack()


class _Asker:
    """Somebody who asks, for as long as it is referred to."""


_askers: WeakSet[_Asker] = WeakSet()


@contextmanager
def eager() -> Iterator[None]:
    """What was compiled runs eagerly inside; the compiled code itself is kept.

    Those who ask may end in any order, and one that is forgotten ends with its last reference: torch's own way puts
    back what it found, which for the one that ends last may be another's. One that Ctrl-C breaks off as it begins or
    ends is forgotten, too, and ends with the next.
    """
    asker = _Asker()
    try:
        with _lock:
            if not _askers:
                _stance.close()  # of one that was broken off
                _stance.enter_context(torch.compiler.set_stance("force_eager"))
            _askers.add(asker)
        yield
    finally:
        with _lock:
            _askers.discard(asker)
            if not _askers:
                _stance.close()
