"""Statistics that a query needs and the run did not gather, or not over all rows."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from numpy.typing import NDArray

from logix_like.errors import ModelMismatchError, QueryError, StatisticsError
from logix_like.layout import Layout
from logix_like.linalg.finite import require_finite
from logix_like.preconditioner import has_kronecker
from logix_like.query.gradients import QueryGradients
from logix_like.query.memory import allowed_memory
from logix_like.query.scan import Candidates
from logix_like.statistics import (
    COVARIANCE_LIMIT,
    ROW_SUMS,
    Statistics,
    StatisticsAccumulator,
    corrected_sums,
    covariance_field,
    sketch_rank,
)
from logix_like.store.reading.view import Rows


class QueryStore(Protocol):
    """What a query reads of a store."""

    def __len__(self) -> int:
        """Count the stored rows, valid or not."""

    @property
    def key(self) -> str:
        """Identifies the rows: equal keys, equal rows."""

    @property
    def projections_digest(self) -> str:
        """Tells the projections of the rows from others; empty where they are not known."""

    @property
    def damaged_rows(self) -> int:
        """How many stored rows are left out since their files are damaged."""

    @property
    def valid(self) -> NDArray[Any]:
        """``[rows]`` bool: which rows are finite and not superseded."""

    @property
    def statistics(self) -> Statistics:
        """Sums over the rows, as far as they were gathered."""

    def view(self, reduce: str) -> Rows:
        """Give each sample's ``mean``, ``sum`` or ``last`` visit, or every visit by itself (``none``)."""


NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "identity": (),
        "diagonal": ("variance",),
        "covariance": ("covariance",),
        "kfac": ("kronecker",),
        "ekfac": ("kronecker", "corrected_eigval"),
    }
)
"""Statistics that a preconditioner needs of every module; ``auto`` is decided by what there is."""


def statistics_for(preconditioner: str, store: QueryStore, progress: bool | None = None) -> Statistics:
    """Give the statistics to fit ``preconditioner`` from, completed by a pass over the store where needed.

    ``auto`` brings a gathered covariance and EK-FAC's eigenvalues up to date, and computes a covariance only when some
    module has neither one nor Kronecker factors. A covariance asked for by name is computed whatever the block's size,
    sketched where the block is large; :class:`StatisticsError` where this process's memory does not hold them all.
    """
    if preconditioner == "covariance":
        _require_memory(store.statistics.layout)
    if preconditioner != "auto":
        return ensure_statistics(store, NEEDED[preconditioner], covariance_limit=sys.maxsize, progress=progress)
    small = [block for block in store.statistics.layout if block.size <= COVARIANCE_LIMIT]
    gathered = any(store.statistics.has(block.name, "outer_sum") for block in small)
    bare = any(not has_kronecker(store.statistics, block) for block in small)
    corrected = any(store.statistics.has(block.name, "corrected_square_sum") for block in store.statistics.layout)
    needed = [*(["covariance"] if gathered or bare else []), *(["corrected_eigval"] if corrected else [])]
    return ensure_statistics(store, needed, progress=progress)


def ensure_statistics(
    store: QueryStore,
    needed: Collection[str],
    *,
    covariance_limit: int = COVARIANCE_LIMIT,
    progress: bool | None = None,
) -> Statistics:
    """The store's statistics with those ``needed`` complete: over all valid rows, every visit counted.

    Sums over rows that are missing, or cover more or fewer rows than are valid, are computed again in one pass over
    the store, and so are EK-FAC's eigenvalues; where nothing is, the store's own are returned. Kronecker factors need
    the model's activations and cannot be had from rows: they are taken as gathered, rows that were taken back since
    included (``superseded`` says how many).

    Args:
        store: All visit rows, and what was gathered over them.
        needed: Names out of :data:`logix_like.statistics.STATISTICS`.
        covariance_limit: Blocks with more numbers get no covariance.
        progress: As in :meth:`Candidates.tiles`.

    Raises:
        StatisticsError: Kronecker factors are needed and were not gathered; names the module.
        EmptyStoreError: a pass is needed and no row is valid.
    """
    statistics = store.statistics
    if "kronecker" in needed:
        _require_kronecker(statistics)
    names = [name for name in needed if ROW_SUMS[name]]
    candidates = Candidates.valid(store.view("none"))
    # With rows taken back since, equal numbers of rows would not tell that they are the same rows.
    stale = statistics.stale > 0
    if names and (stale or not _covers(statistics, names, candidates.count, covariance_limit)):
        computed = _row_sums(names, candidates, covariance_limit, progress)
        statistics = statistics.with_row_sums(computed, len(store))
    if "corrected_eigval" in needed and (stale or not _covers_corrected(statistics, candidates.count)):
        rows = (tile.values for tile in candidates.tiles(progress, "EK-FAC eigenvalues"))
        statistics = statistics.with_corrected(corrected_sums(statistics, rows))
    return statistics


def whole_statistics(store: QueryStore, gathered: Collection[str]) -> Statistics:
    """The store's statistics with those ``gathered`` brought up to all rows that count; its own where they are.

    What was gathered lacks the rows that a killed start had committed and not summed up yet, holds rows that were
    taken back since, and has EK-FAC's eigenvalues never, which need all rows. Kronecker factors stay as they are.
    """
    statistics = store.statistics
    if not store.valid.any():
        return statistics
    kept = all(has_kronecker(statistics, block) for block in statistics.layout)
    names = [name for name in gathered if ROW_SUMS[name] or (kept and name != "kronecker")]
    whole = ensure_statistics(store, names)
    # Rows that were taken back before they were summed up are in no sum, and need not be.
    return whole.over(len(store)) if names and whole.rows < len(store) else whole


def _require_kronecker(statistics: Statistics) -> None:
    """Refuse factors that were not gathered, or cannot be decomposed since a sum overflowed."""
    for block in statistics.layout:
        if not has_kronecker(statistics, block):
            raise StatisticsError(
                f"the Kronecker factors of module {block.name!r} were not gathered, and stored rows do not "
                "give them; put 'kronecker' under 'statistics' in the config before training, or ask with "
                "preconditioner='covariance'"
            )
        factors = statistics.kronecker(block.name)
        require_finite(factors.output, block.name)
        require_finite(factors.input, block.name)


def _require_memory(layout: Layout) -> None:
    """Refuse covariances that this process cannot hold, before it tries."""
    needed, there = _covariance_bytes(layout), allowed_memory()
    if there is not None and needed > there:
        raise StatisticsError(
            f"the covariances of {len(layout):,} modules, {layout.width:,} numbers in all, take "
            f"{needed / 2**30:,.1f} GiB, and this process may have {there / 2**30:,.1f}: ask with "
            "preconditioner='ekfac', 'kfac' or 'diagonal', or log fewer numbers a module (a lower rank)"
        )


def _covariance_bytes(layout: Layout, rows: int | None = None) -> int:
    """What covariances of ``rows`` rows take."""
    numbers = [block.size * (sketch_rank(block.size, rows) or block.size) for block in layout]
    # Sums in float64 and inverses in float32, of all; and what inverting the largest takes.
    return 16 * sum(numbers) + 40 * max(numbers, default=0)


def _covers(statistics: Statistics, names: Collection[str], rows: int, covariance_limit: int) -> bool:
    """Whether every sum that ``names`` need is there for every module, over exactly ``rows`` rows.

    The watermark does not tell: it also counts rows that are not finite, which are in no sum.
    """
    fields = {field for name in names for field in ROW_SUMS[name]}
    return all(
        statistics.has(block.name, _held_as(field, block.size)) and _count(statistics, block.name, "rows") == rows
        for block in statistics.layout
        for field in fields
        if field != "outer_sum" or block.size <= covariance_limit
    )


def _held_as(field: str, size: int) -> str:
    return covariance_field(size) if field == "outer_sum" else field


def _count(statistics: Statistics, module: str, field: str) -> int:
    return int(statistics.sums[module][field].item()) if statistics.has(module, field) else 0


def _covers_corrected(statistics: Statistics, rows: int) -> bool:
    return all(
        statistics.has(block.name, "corrected_square_sum") and _count(statistics, block.name, "corrected_rows") == rows
        for block in statistics.layout
    )


def _row_sums(
    names: Collection[str], candidates: Candidates, covariance_limit: int, progress: bool | None
) -> Statistics:
    """Those sums of one pass over ``candidates``."""
    layout, rows = candidates.rows.layout, candidates.count
    there = allowed_memory()
    expected = rows if there is None or 2 * _covariance_bytes(layout, rows) <= there else None
    accumulator = StatisticsAccumulator(layout, names, covariance_limit=covariance_limit, expected=expected)
    for tile in candidates.tiles(progress, "statistics"):
        accumulator.update(tile.values)
    return accumulator.snapshot()


def require_answerable(query: QueryGradients, layout: Layout, store: QueryStore) -> None:
    """Refuse what cannot be asked: no query, one that is not finite, or one of another model or other projections."""
    if not isinstance(query, QueryGradients):
        raise QueryError(
            f"the query is a {type(query).__name__}; it must be QueryGradients: those of 'with run.query(...) as "
            "q' are q.gradients, saved ones come from QueryGradients.load(...)"
        )
    if query.layout != layout:
        layout.require_same(query.layout)
    known = store.projections_digest if query.projections else ""
    if known and query.projections != known:
        raise ModelMismatchError(
            f"the queries were projected with other matrices ({query.projections}) than the rows ({known}): "
            "another seed or another basis, so that no number of theirs means the same; capture the queries with "
            "the store's projections (resume the run, or load them from the store)"
        )
    query.require_answerable()
