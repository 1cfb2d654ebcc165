"""Compiled models run eagerly for as long as anybody asks for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_stance = ExitStack()
_askers = 0


@contextmanager
def eager() -> Iterator[None]:
    """What was compiled runs eagerly inside; the compiled code itself is kept.

    Those who ask may end in any order, and one that is forgotten ends with its last reference: torch's own way puts
    back what it found, which for the one that ends last may be another's.
    """
    _begin()
    try:
        yield
    finally:
        _end()


def _begin() -> None:
    global _askers
    with _lock:
        if not _askers:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _askers += 1


def _end() -> None:
    global _askers
    with _lock:
        _askers -= 1
        if not _askers:
            _stance.close()
