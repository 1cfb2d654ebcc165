"""What can be asked, and what makes no sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from logix_like.damping import Damping
from logix_like.errors import QueryError
from logix_like.preconditioner import require_preconditioner
from logix_like.query.modes import MODES
from logix_like.query.parts import PARTS
from logix_like.query.result import is_count

REDUCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "mean": "samples, each the mean of its visits",
        "sum": "samples, each the sum of its visits",
        "last": "samples, each its last visit",
        "none": "visits, each by itself",
    }
)
"""How visits of one sample are combined, in words."""

ENGINES = ("exact", "faiss", "dask")
"""``exact`` reads every row; ``faiss`` asks an index and scores its candidates exactly; ``dask`` reads every row on
several processes or machines."""


@dataclass(frozen=True)
class Question:
    """The options of a query; a wrong one is a :class:`QueryError` that lists the right ones."""

    k: int | None
    preconditioner: str
    damping: Damping
    mode: str
    reduce: str
    engine: str = "exact"
    per: str | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        """Check every option that needs no store to be checked."""
        require_preconditioner(self.preconditioner)
        for what, name, known in (
            ("mode", self.mode, tuple(MODES)),
            ("reduce", self.reduce, tuple(REDUCTIONS)),
            ("engine", self.engine, ENGINES),
            ("per", self.per, (None, *PARTS)),
        ):
            if name not in known:
                raise QueryError(f"unknown {what} {name!r}; known: {', '.join(map(str, known))}")
        if self.k is not None and not is_count(self.k):
            raise QueryError(f"k is {self.k!r}; it must be a whole number, or None for the scores of all samples")
        if self.k is not None and self.k < 1:
            raise QueryError(f"k is {self.k}; it must be at least 1, or None for the scores of all samples")
        if self.k is None and self.engine != "exact":
            raise QueryError(f"engine={self.engine!r} finds the first k only: give k=, or ask with engine='exact'")
        if self.per is not None and not MODES[self.mode].proportional:
            raise QueryError(
                f"a score of mode {self.mode!r} is no sum over modules: ask per={self.per!r} in another mode"
            )

    @property
    def described(self) -> str:
        """What a score is, in words."""
        return f"{self.mode} score" + (", queries at length 1" if self.normalize else "")
