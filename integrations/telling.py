"""A run's numbers in a trainer's own log, whenever the trainer writes there."""

from __future__ import annotations

from typing import Any

import logix_like as logix
from logix_like.scalars import ScalarLog, sink_of


class Telling:
    """What a callback does with its ``log_to``; nothing where there is none.

    Raises:
        ConfigError: ``log_to`` is nothing to log to; said before a long training.
    """

    def __init__(self, log_to: Any) -> None:
        self._sink = None if log_to is None else sink_of(log_to)
        self._scalars: ScalarLog | None = None
        self._busy = False

    def begin(self, run: logix.Run) -> None:
        """The run that is told of from now on."""
        if self._sink is not None:
            self._scalars = ScalarLog(run, log_to=self._sink)

    def tell(self, step: int) -> None:
        """Write the run's numbers. A trainer that is written to calls back, which is no cause to write again."""
        if self._scalars is None or self._busy:
            return
        self._busy = True
        try:
            self._scalars.write(step)
        finally:
            self._busy = False
