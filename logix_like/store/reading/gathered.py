"""The statistics of a store's parts: which rows each covers, and all together.

A part's own statistics cover its first so many rows. Once a resumed run is finished, those of its last part stand for
the parts before as well, of which some were killed with rows that were committed and not summed up yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from logix_like.errors import StoreDamagedError
from logix_like.statistics import Statistics
from logix_like.store.format.attempts import WriterInfo
from logix_like.store.format.retractions import Retraction
from logix_like.store.format.schema import Flag
from logix_like.store.format.sums import Coverage, StoredStatistics, load_latest_statistics
from logix_like.store.reading.table import RowTable


class GatheredStatistics:
    """What was gathered over the rows of ``table``, those of ``writers``; read at first use and then kept.

    ``damaged`` is how many rows were left out since a file of theirs is damaged, and damaged statistics then are too;
    None: those raise.
    """

    def __init__(
        self,
        writers: tuple[WriterInfo, ...],
        retractions: tuple[Retraction, ...],
        table: RowTable,
        damaged: int | None = None,
    ) -> None:
        self._writers = writers
        self._retractions = retractions
        self._table = table
        self._damaged = damaged
        self._findings: list[str] = []

    @cached_property
    def together(self) -> Statistics:
        """All writers' statistics added; known to hold rows that are left out, if any are."""
        parts = list(self.of_writers.values())
        if not parts:
            return Statistics(self._table.layout, {}, 0)
        merged = Statistics.merge(parts)
        return merged if merged.stale else merged.less(self._damaged or 0)

    @cached_property
    def of_writers(self) -> Mapping[str, Statistics]:
        """Those that were written last, by writer; known to cover rows that were taken back since."""
        gone = {writer.name: writer.commits.gone for writer in self._writers}
        found = {}
        for name, (stored, coverage) in self._stored.items():
            taken_back = self._taken_back(coverage)
            # Of commits that a repair took out the record tells the number alone: one row each at least.
            lost = gone[name] if stored.coverage is None and not taken_back else 0
            found[name] = stored.statistics.less(taken_back + lost)
        return found

    @property
    def covered_rows(self) -> Mapping[str, int]:
        """How many of its rows the statistics cover, by writer."""
        covered = {writer.name: 0 for writer in self._writers}
        for _, coverage in self._stored.values():
            covered |= coverage.rows
        return covered

    @property
    def damages(self) -> tuple[str, ...]:
        """What is wrong with statistics that are left out, where damaged ones are to be."""
        _ = self._stored
        return tuple(self._findings)

    @property
    def whole(self) -> Coverage:
        """What statistics cover that are taken over all rows that count."""
        rows = {writer.name: writer.rows for writer in self._writers}
        return Coverage(rows, int(np.count_nonzero(self._table.flags & int(Flag.SUPERSEDED))))

    @cached_property
    def _stored(self) -> Mapping[str, tuple[StoredStatistics, Coverage]]:
        """By writer; one whose statistics are in those of a later one has none."""
        found: dict[str, tuple[StoredStatistics, Coverage]] = {}
        for writer in reversed(self._writers):
            if writer.commits.statistics is None or any(writer.name in one.rows for _, one in found.values()):
                continue
            try:
                stored = load_latest_statistics(writer.folder, writer.commits.statistics, self._table.layout)
            except StoreDamagedError as error:
                if self._damaged is None:
                    raise
                self._findings.append(f"{error} (left out: sums over rows are computed anew, Kronecker factors lost)")
                continue
            found[writer.name] = (stored, stored.coverage or Coverage({writer.name: writer.statistics_rows}, 0))
        return dict(reversed(found.items()))

    def _taken_back(self, coverage: Coverage) -> int:
        """How many of the covered rows were taken back since, or are there no more (a repair took them out)."""
        there = {writer.name: writer.rows for writer in self._writers}
        lost = sum(max(0, rows - there.get(name, 0)) for name, rows in coverage.rows.items())
        if not any(name in retraction.reach for retraction in self._retractions for name in coverage.rows):
            return lost
        first, superseded = 0, -coverage.superseded
        for name, rows in there.items():
            covered = self._table.flags[first : first + min(rows, coverage.rows.get(name, 0))]
            superseded += int(np.count_nonzero(covered & int(Flag.SUPERSEDED)))
            first += rows
        return lost + max(0, superseded)
