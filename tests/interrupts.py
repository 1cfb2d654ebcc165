"""Ctrl-C at a chosen place."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

PLACES = ("logix_like", "threading.py")
"""Where it comes: not in the import system, say, which does not stand it either."""
CHECKED = ("RESUME", "CALL", "JUMP_BACKWARD")
"""Behind these instructions the interpreter looks for a signal, and nowhere else: never between the end of what stands
in a ``with`` statement and the release of its lock."""


def broken_off_at(step: int, call: Callable[[], object]) -> bool:
    """Raise KeyboardInterrupt at a step of the interpreter within ``call``; whether that ended before."""
    steps, before = 0, sys.gettrace()
    codes: dict[object, bytes] = {}
    last: dict[int, str] = {}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal steps
        code = frame.f_code
        if not any(place in code.co_filename for place in PLACES):
            return None
        frame.f_trace_opcodes = True
        if event == "call":
            last[id(frame)] = ""
        elif event == "opcode":
            steps += last[id(frame)].startswith(CHECKED)
            if steps == step:
                sys.settrace(before)
                raise KeyboardInterrupt
            if code not in codes:
                codes[code] = code.co_code  # made anew each time it is asked for
            last[id(frame)] = dis.opname[codes[code][frame.f_lasti]]
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(before)
    return True
