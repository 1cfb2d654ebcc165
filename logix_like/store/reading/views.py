"""The sample views of a table: found on disk, made when there is none, kept while it is open."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from logix_like.errors import StoreError
from logix_like.store.encoding.kinds import encoding_of_means
from logix_like.store.format.schema import MEAN_VIEWS
from logix_like.store.places.files import Place
from logix_like.store.reading.means import build_means, cache_folder, is_sound, open_means
from logix_like.store.reading.table import RowTable
from logix_like.store.reading.view import Rows, Visits, digest, group_visits, select_last


class SampleViews:
    """Views of one table, each made at its first use.

    ``checked``: those that are kept are read whole first, and damaged ones are made anew.
    """

    def __init__(self, store: Place, created: str, table: RowTable, *, checked: bool = False) -> None:
        self._table = table
        self._checked = checked
        name = f"{digest(table)}-{encoding_of_means(table.encoding).name}"
        self._own = store / MEAN_VIEWS / name if isinstance(store, Path) else None
        self._cached = cache_folder(store, created) / name
        self._views: dict[str, Rows] = {}

    def get(self, reduce: str) -> Rows:
        """The view for one of :data:`~logix_like.store.reading.view.REDUCTIONS`."""
        if reduce not in self._views:
            self._views[reduce] = self._make(reduce)
        return self._views[reduce]

    def build(self) -> Path | None:
        """Write the mean view into the store itself; None where the rows are the view, or are in an object store.

        There each reader keeps the view in its cache folder, where it is mapped and not fetched again.
        """
        if self._own is None or self._visits.single:
            return None
        if open_means(self._own, self._table, "mean") is None:
            build_means(self._table, self._visits, self._own)
        return self._own

    @cached_property
    def _visits(self) -> Visits:
        return group_visits(self._table)

    def _make(self, reduce: str) -> Rows:
        if reduce == "none":
            return self._table
        if reduce == "last":
            return select_last(self._table, self._visits, reduce)
        means = self._find(reduce)
        if means is not None:
            return means
        if self._visits.single:
            return select_last(self._table, self._visits, reduce)
        build_means(self._table, self._visits, self._cached)
        means = self._find(reduce)
        if means is None:
            raise StoreError(f"the sample view at {self._cached} disappeared while it was opened; ask again")
        return means

    def _find(self, reduce: str) -> RowTable | None:
        key = f"{reduce}:{digest(self._table)}"
        for folder in (self._own, self._cached):
            means = None if folder is None else self._opened(folder, key)
            if means is not None:
                return _as_sum(means) if reduce == "sum" else means
        return None

    def _opened(self, folder: Path, key: str) -> RowTable | None:
        if self._checked and not is_sound(folder):
            return None
        return open_means(folder, self._table, key)


def _as_sum(means: RowTable) -> RowTable:
    """The same rows with the number of visits as their factor."""
    return RowTable(
        means.segments,
        means.layout,
        means.encoding,
        means.column_names,
        means.key,
        left_out=means.left_out,
        factor=means.visits.astype(np.float64),
        hold=means.hold,
    )
