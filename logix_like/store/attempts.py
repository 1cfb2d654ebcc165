"""The parts of a store: one for each start of each writing process, or one in which others were merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from logix_like.errors import StoreDamagedError
from logix_like.store.commits import CommitReader, Commits
from logix_like.store.damage import IntactRows
from logix_like.store.files import Place, names_in
from logix_like.store.pipeline import parse_writer_name
from logix_like.store.schema import WRITERS
from logix_like.timing import Timing


@dataclass(frozen=True)
class WriterInfo:
    """One writing process, as its record tells of it."""

    name: str
    """``<rank>-<attempt>``."""
    rank: int
    """Number of the process."""
    attempt: int
    """Which start of it, from 1."""
    folder: Place
    """Its part of the store."""
    commits: Commits
    """Its record."""

    @property
    def rows(self) -> int:
        """Committed rows."""
        return self.commits.total

    @property
    def cursor(self) -> tuple[int, int]:
        """``(epoch, step)`` of the last committed row, -1 unknown."""
        return (self.commits.rows[-1].epoch, self.commits.rows[-1].step) if self.commits.rows else (-1, -1)

    @property
    def timing(self) -> Timing:
        """What the training took for its rows, and logging of it."""
        return sum((record.timing for record in self.commits.rows), Timing())

    @property
    def statistics_rows(self) -> int:
        """How many of the rows the written statistics cover."""
        return self.commits.statistics.watermark if self.commits.statistics else 0

    @property
    def dropped(self) -> str:
        """What was wrong with the record's last line, which is left out then; empty where nothing was."""
        if self.commits.spoilt:
            return "its last record is damaged, and the rows of that commit are left out"
        if self.commits.torn:
            return "its last record is torn, as a kill leaves it: those rows were never committed"
        return ""

    @property
    def state(self) -> str:
        """``closed``; or ``open``, which a live writer and a killed one are alike."""
        return "closed" if self.commits.closed else "open"


def without_damage(writers: tuple[WriterInfo, ...], intact: IntactRows) -> tuple[WriterInfo, ...]:
    """The same without the commits of which a file is damaged."""
    kept, first = [], 0
    for writer in writers:
        kept.append(replace(writer, commits=intact.of(writer.folder, writer.commits, first)))
        first += writer.rows
    return tuple(kept)


def read_intact(
    path: Place, records: CommitReader, intact: IntactRows
) -> tuple[tuple[WriterInfo, ...], tuple[WriterInfo, ...]]:
    """All parts of a store, and the same without the commits of which a file is damaged."""
    while True:
        writers = read_writers(path, records)
        kept = without_damage(writers, intact)
        if kept == writers or [one.name for one in read_writers(path, records)] == [one.name for one in writers]:
            return writers, kept
        # A merge put one part in the place of others while their files were read: they are gone, not damaged.


def read_writers(path: Place, records: CommitReader) -> tuple[WriterInfo, ...]:
    """All parts of a store that are read, in row order.

    Raises :class:`StoreDamagedError` when a record is damaged, or there is no folder of parts.
    """
    folder = path / WRITERS
    names = _part_names(folder)
    while True:
        parts = _read_parts(folder, names, records)
        known, names = names, _part_names(folder)
        if names == known:  # else a merge may just have put one part in the place of others
            return parts


def _part_names(folder: Place) -> dict[str, tuple[int, int]]:
    found = names_in(folder)
    if not found:  # there is at least the group's document
        raise StoreDamagedError(f"{folder} is missing; restore the store from a copy")
    names = {name: parse_writer_name(name) for name in found}
    return {name: order for name, order in names.items() if order is not None}


def _read_parts(folder: Place, names: Mapping[str, tuple[int, int]], records: CommitReader) -> tuple[WriterInfo, ...]:
    started = sorted((order, name) for name, order in names.items())
    parts = [
        WriterInfo(name, rank, attempt, folder / name, records.read(folder / name)) for (attempt, rank), name in started
    ]
    replaced = {name for part in parts for name in part.commits.replaces}
    return tuple(part for part in parts if part.name not in replaced)
