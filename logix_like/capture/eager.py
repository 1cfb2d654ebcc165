"""Compiled models run eagerly for as long as anybody asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch


class _Asker:
    """Somebody who asks, for as long as it is referred to."""


_askers: WeakSet[_Asker] = WeakSet()
_stances: list[Any] = []


@contextmanager
def eager() -> Iterator[None]:
    """What was compiled runs eagerly inside; the compiled code itself is kept.

    Those who ask may end in any order, and one that is forgotten ends with its last reference: torch's own way puts
    back what it found, which for the one that ends last may be another's. One that Ctrl-C breaks off as it begins or
    ends is forgotten, too, and ends with the next.
    """
    asker = _Asker()
    try:
        _askers.add(asker)
        _settle()
        yield
    finally:
        _askers.discard(asker)
        _settle()


def _settle() -> None:
    # No lock, which Ctrl-C could leave held for good: what another thread changes meanwhile is seen by looking again.
    while bool(_askers) != bool(_stances):
        if _askers:
            _stances.append(torch.compiler.set_stance("force_eager"))
        else:
            _stances[-1].__exit__(None, None, None)
            _stances.pop()
