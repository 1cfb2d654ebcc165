"""How much of a training's time logging takes, by the clock of the process that trains.

No accelerator is waited for: of what runs there only the time is seen that the process itself spends or waits. What the
writer's threads do beside the training is not in the figure either, but for the time that the training waits for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

ONCE = 2
"""Laps that are not counted: to the begin of the first block, and through it, whose work for the start is done once."""


Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Timing:
    """Seconds of a training and how many of them were spent here."""

    seconds: float = 0.0
    """From the begin of one block to that of the next, whatever lies between."""
    logging: float = 0.0
    """Of these, in hooks, at the begin and end of blocks, and waiting for the writer."""

    @property
    def overhead(self) -> float | None:
        """By what part of itself logging prolonged the training (0.04: by 4 %); None where nothing was measured."""
        without = self.seconds - self.logging
        return self.logging / without if without > 0 else None

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.seconds + other.seconds, self.logging + other.logging)

    def __sub__(self, other: Timing) -> Timing:
        return Timing(self.seconds - other.seconds, self.logging - other.logging)

    def __truediv__(self, count: int) -> Timing:
        return Timing(self.seconds / count, self.logging / count)


NOTHING = Timing()
"""Where nothing was measured."""


class Stopwatch:
    """Counts the seconds within its ``with`` statements, once where they are nested, and those of whole laps.

    Hooks may run in several threads at once, one for each device: their time counts once, too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._entered = 0.0
        self._inside = 0.0
        self._laps = 0
        self._lap: Timing | None = None
        self.total = Timing()
        """All laps together."""

    def __enter__(self) -> None:
        with self._lock:
            if not self._depth:
                self._entered = perf_counter()
            self._depth += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self._inside += perf_counter() - self._entered

    def timed(self, act: Callable[..., Answer]) -> Callable[..., Answer]:
        """``act``, whose time counts as inside."""

        def counted(*args: object) -> Answer:
            with self:
                return act(*args)

        return counted

    def lap(self) -> Timing:
        """Begin a lap; what the last one took, nothing for the first :data:`ONCE`."""
        now, last = Timing(perf_counter(), self._inside), self._lap
        self._lap = now
        self._laps += 1
        if last is None or self._laps <= ONCE:
            return Timing()
        took = now - last
        took = Timing(took.seconds, min(took.logging, took.seconds))  # a lap begins within a with statement
        self.total += took
        return took
