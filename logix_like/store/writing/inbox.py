"""What the thread that trains hands to the one that writes: batches and requests."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from logix_like.capture.batch import ProjectedBatch
from logix_like.store.format.sums import StoredStatistics

LOOK_SECONDS = 1.0
"""How often a thread that waits looks again by itself: whoever was to wake it may have been broken off."""
ENDING_SECONDS = 0.005
"""The same of one that waits for the end of the other."""


@dataclass(frozen=True)
class Request:
    """Something to do after all rows put before it."""

    last: bool = False
    """Whether nothing follows."""
    statistics: StoredStatistics | None = None
    """To be written in place of the gathered ones."""
    done: SimpleQueue[bool] = field(default_factory=SimpleQueue)
    """Whether it was, once that is known."""


@dataclass(eq=False)
class _Parcel:
    """A batch in the queue."""

    batch: ProjectedBatch
    taken: bool = False
    """Whether the worker has it."""


@dataclass(frozen=True)
class Taken:
    """What the worker has to do."""

    batches: Sequence[ProjectedBatch] = ()
    """Rows to be written, in this order."""
    requests: Sequence[Request] = ()
    """To be answered after that."""
    due: float = math.inf
    """When the oldest row is to be committed, by the monotonic clock."""


class Inbox:
    """A queue of batches, bounded by their bytes, and of requests, which are never held up.

    Ctrl-C may break off the training thread anywhere. Here it leaves nothing locked: all that is shared are queues
    whose calls cannot be broken off half-way, and numbers that one thread writes. (``threading.Condition`` stays
    locked for good when it is broken off in its ``__enter__``.)

    Nobody is woken for a single batch, since two threads that hand the interpreter to and fro for each take several
    times as long: the worker is when a chunk of rows has come, when half of the queue is full, when somebody waits, or
    when the oldest row has waited long enough; who waits is when the worker is done with what it took.
    """

    def __init__(self, limit: int, commit_seconds: float) -> None:
        self._limit = limit
        self._commit_seconds = commit_seconds
        self._items: SimpleQueue[_Parcel | Request] = SimpleQueue()
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        self._put = self._taken = self._done = 0
        """Bytes so far. A put that is broken off may not be counted: that much more then fits, never less."""
        self._rows_put = self._rows_taken = 0
        self._since = 0.0
        """When the first of what waits came."""
        self._wanted = 1
        self._idle = False
        """Whether the worker knows of nothing that waits, and so not until when."""
        self._asked = False
        """Whether there may be a request."""
        self._awaited = False
        """Whether somebody may be waiting for room."""
        self.error: BaseException | None = None
        self.told = False
        """Whether somebody was told of it."""
        self._closing = False
        """Whether the last item is queued."""
        self.ended = False
        """Whether the worker takes no more, for an error or because it was told of the last item."""

    def put(self, batch: ProjectedBatch) -> bool:
        """Queue a batch, waiting while it does not fit; False if the worker has ended."""
        size = batch.nbytes
        while self._is_open() and self._is_full_for(size):
            self._awaited = True
            self._calls.put(None)
            if self._is_full_for(size):  # still: the worker, who looks when it is done, cannot have missed the above
                with suppress(Empty):
                    self._room.get(timeout=LOOK_SECONDS)
        if not self._is_open():
            return False
        if self._items.empty():
            self._since = time.monotonic()
        parcel = _Parcel(batch)
        self._items.put(parcel)
        self._put += size
        self._rows_put += len(batch.data_id)
        if (self._idle or self._worthwhile()) and self._calls.empty():
            self._calls.put(None)
        if self._is_open():
            return True
        while not self.ended:  # it may stand behind the last request, which is asked for at this moment
            time.sleep(ENDING_SECONDS)
        return parcel.taken and self.error is None

    def ask(self, request: Request) -> bool:
        """Queue a request; False if the worker has ended."""
        self._closing |= request.last
        self._items.put(request)
        self._asked = True
        self._calls.put(None)
        return not self.ended

    def take(self, wanted: int, due: float) -> Taken:
        """All that waits, once it is ``wanted`` rows or urgent, or the time is ``due``; the last is done with."""
        self._done = self._taken
        self._wanted = wanted
        if self._awaited:
            self._awaited = False
            self._room.put(None)
        while not self._worthwhile():
            self._idle = True  # first: what is put behind the next line calls
            self._idle = self._items.empty()
            left = min(due, self._due()) - time.monotonic()
            if left <= 0:
                break
            with suppress(Empty):
                self._calls.get(timeout=min(left, LOOK_SECONDS))
        self._idle = self._asked = False
        due = min(due, self._due())
        items = list(self._waiting())
        batches: list[ProjectedBatch] = []
        for item in items:
            if isinstance(item, _Parcel):
                item.taken = True
                batches.append(item.batch)
        if batches:  # they may have come since the line above
            due = min(due, time.monotonic() + self._commit_seconds)
        self._taken += sum(batch.nbytes for batch in batches)
        self._rows_taken += sum(len(batch.data_id) for batch in batches)
        return Taken(batches, [item for item in items if isinstance(item, Request)], due)

    def end(self, taken: Taken, error: BaseException | None = None) -> None:
        """Refuse all further items and wake everyone who waits, those whose requests were ``taken`` included."""
        self.error = error
        self.ended = True
        self._room.put(None)
        for item in (*taken.requests, *self._waiting()):
            if isinstance(item, Request):
                item.done.put(False)

    def _waiting(self) -> Iterator[_Parcel | Request]:
        """Takes out what there is."""
        with suppress(Empty):
            while True:
                yield self._items.get_nowait()

    def _due(self) -> float:
        """When what waits is to be committed."""
        return math.inf if self._items.empty() else self._since + self._commit_seconds

    def _worthwhile(self) -> bool:
        full = 2 * (self._put - self._taken) >= self._limit
        return full or self._asked or self._awaited or self._rows_put - self._rows_taken >= self._wanted

    def _is_open(self) -> bool:
        return not self._closing and not self.ended

    def _is_full_for(self, size: int) -> bool:
        held = self._put - self._done
        return held > 0 and held + size > self._limit
