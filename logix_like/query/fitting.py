"""Preconditioners of a store, fitted when first asked for and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import RLock
from typing import Generic, TypeVar

from logix_like.damping import Damping
from logix_like.preconditioner import Eigenbases, FittedPreconditioner, fit_preconditioner
from logix_like.query.completion import QueryStore, statistics_for

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The few values used last, by key; what a changed key makes stale falls out in time.

    Threads may ask at once: a value is made by one of them, and the others wait for it.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = RLock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made by ``make`` unless it is held."""
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
                if len(self._values) > self._capacity:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
            return self._values[key]


@dataclass(frozen=True)
class Fit:
    """A fitted preconditioner, and how to name it."""

    preconditioner: FittedPreconditioner
    described: str
    """What it is and what it was fitted to, in words."""
    rows: int
    """How many of the stored rows are valid."""
    key: Hashable
    """Identifies the rows, the statistics, the preconditioner and its damping."""


class Fitter:
    """Fits preconditioners to a store's statistics.

    What is kept depends on the rows, what was gathered over them (a training writes it after its rows), the name and
    the damping, so a change of any takes effect at once; another damping takes eigenbases over from the fit before.
    """

    def __init__(self, store: QueryStore) -> None:
        self._store = store
        self._eigenbases: Recent[Eigenbases] = Recent(2)
        self._fits: Recent[Fit] = Recent(4)

    def fit(self, name: str, damping: Damping, progress: bool | None) -> Fit:
        """The preconditioner ``name`` with ``damping``; a missing statistic is computed from the store."""
        # Statistics are the same as long as they are one object, which the key keeps from being another.
        key = (self._store.key, self._store.statistics, name, damping)
        return self._fits.get(key, lambda: self._make(key, name, damping, progress))

    def _make(self, key: tuple[Hashable, ...], name: str, damping: Damping, progress: bool | None) -> Fit:
        # Only what is automatic asks how many samples there are; telling visits apart is not free.
        counted = name == "auto" or damping.kind == "auto"
        eigenbases = self._eigenbases.get((*key[:3], counted), lambda: self._decomposed(name, counted, progress))
        statistics = eigenbases.statistics
        layout = statistics.layout
        fitted = fit_preconditioner(name, statistics, layout, damping, eigenbases=eigenbases)
        rows = int(self._store.valid.sum())
        described = f"preconditioner {fitted.summary()}"
        if name != "identity":
            described += f", damping {damping}, empirical Fisher over {_covered(fitted, rows)} rows"
        if statistics.superseded and "kfac" in fitted.summary():
            described += f", Kronecker factors also of {statistics.superseded:,} rows that were taken back since"
        return Fit(fitted, described, rows, key)

    def _decomposed(self, name: str, counted: bool, progress: bool | None) -> Eigenbases:
        samples = len(self._store.view("mean")) if counted else None
        return Eigenbases(statistics_for(name, self._store, progress), samples)


def _covered(fitted: FittedPreconditioner, valid: int) -> str:
    """How many rows ``fitted`` knows of, out of the ``valid`` ones, in words."""
    low, high = (min(count, valid) for count in fitted.rows)
    if low == valid:
        return f"{valid:,}"
    return f"{low:,} of {valid:,}" if low == high else f"{low:,} to {high:,} of {valid:,}"
