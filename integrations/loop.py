"""Whether a trainer's loop still runs: it tells nobody when an error breaks it off."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class RunningLoop:
    """The innermost call of a function that this one is made under.

    The call itself is remembered, so that a later one of the same function, of another trainer or in another thread,
    is not taken for it. Its frame is held until this object is let go.

    Args:
        of: the function that trains.
    """

    def __init__(self, of: Callable[..., Any]) -> None:
        code = inspect.unwrap(of).__code__
        self._thread = threading.get_ident()
        self._frame = next((frame for frame in _stack(self._thread) if frame.f_code is code), None)

    @property
    def is_over(self) -> bool:
        """Whether the call is on its thread's stack no more; false where there was none to begin with."""
        return self._frame is not None and all(frame is not self._frame for frame in _stack(self._thread))


def _stack(thread: int) -> Iterator[FrameType]:
    """Frames of a thread from the innermost out; none of one that has ended."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back
