"""Whether a trainer's loop still runs: it tells nobody when an error breaks it off."""

from __future__ import annotations

import sys
import threading
from types import CodeType, FrameType


class RunningLoop:
    """The function that has just told a callback of the training's begin, known by its place on the stack.

    Args:
        told_by: the module through which a trainer speaks to its callbacks.
    """

    def __init__(self, told_by: str) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") != told_by:
            frame = frame.f_back
        while frame is not None and frame.f_globals.get("__name__") == told_by:
            frame = frame.f_back
        self._code: CodeType | None = None if frame is None else frame.f_code
        self._thread = threading.get_ident()

    @property
    def is_over(self) -> bool:
        """Whether the function is on the stack no more; not known, and so false, in another thread."""
        if self._code is None or threading.get_ident() != self._thread:
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is self._code:
                return False
            frame = frame.f_back
        return True
