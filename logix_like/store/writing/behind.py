"""Doing one thing while the next is prepared."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Behind:
    """Runs tasks one after another in a thread of its own; its owner goes on meanwhile.

    At most one task is under way and none waits, so what tasks hold is bounded. After a task has failed none is taken
    any more: the owner hears of it from each call.
    """

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._task: Callable[[], object] | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._name = name
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; else the first task does, which fails while the interpreter ends; idempotent."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def run(self, task: Callable[[], object]) -> None:
        """Have ``task`` done, once the one before it is; raises what that one raised."""
        self.start()
        with self._changed:
            self._wait()
            self._task = task
            self._changed.notify_all()

    def wait(self) -> None:
        """Return once the last task is done; raises what it raised."""
        with self._changed:
            self._wait()

    def close(self) -> None:
        """Let the task under way end, and the thread with it; raises nothing; idempotent."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    @property
    def is_here(self) -> bool:
        """Whether this is called by a task."""
        return threading.current_thread() is self._thread

    def _wait(self) -> None:
        self._changed.wait_for(lambda: self._task is None)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._task is not None or self._ended)
                task = self._task
            if task is None:
                return
            try:
                task()
            except BaseException as error:  # whatever it is, the owner has to hear of it
                self._error = error
            with self._changed:
                self._task = None
                self._changed.notify_all()
