"""The parts of a store: one for each start of each writing process, or one in which others were merged."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from logix_like.errors import StoreDamagedError
from logix_like.store.format.commits import CommitReader, Commits
from logix_like.store.format.damage import IntactRows
from logix_like.store.format.schema import WRITERS
from logix_like.store.places.files import Place, names_in
from logix_like.timing import Timing

MERGED = "merged"
"""Part of a writer's name that stands for the rank where parts were merged into one."""
MERGED_RANK = -1
"""Its number."""
_WRITER_NAME = re.compile(rf"([0-9]{{1,9}}|{MERGED})-([0-9]{{1,9}})", re.ASCII)


def parse_writer_name(name: str) -> tuple[int, int] | None:
    """``(attempt, rank)`` of a writer's folder name, None for any other name."""
    match = _WRITER_NAME.fullmatch(name)
    return None if match is None else (int(match[2]), MERGED_RANK if match[1] == MERGED else int(match[1]))


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
    standing = standing_parts(folder, records)
    while True:
        try:
            parts = tuple(_read_part(folder / name, records) for name in standing)
        except StoreDamagedError:
            if standing == (standing := standing_parts(folder, records)):
                raise
            continue  # a merge put one part in the place of others, and takes them away
        if standing == (standing := standing_parts(folder, records)):
            return parts


def standing_parts(folder: Place, records: CommitReader) -> list[str]:
    """Names of the parts that are read, in row order: those that were merged into another one are not.

    A merged part stands from the closing of its record on. One that was not closed is what a killed merge left, as
    long as all that it was to replace is there; else its last line was damaged since.
    """
    found = names_in(folder)
    if not found:  # there is at least the group's document
        raise StoreDamagedError(f"{folder} is missing; restore the store from a copy")
    started = sorted((order, name) for name in found if (order := parse_writer_name(name)) is not None)
    names = [name for _, name in started]
    left_out: set[str] = set()
    for (_, rank), name in started:
        if rank == MERGED_RANK:
            commits = records.read(folder / name)
            finished = commits.closed or not set(commits.replaces) <= set(names)
            left_out |= set(commits.replaces) if finished else {name}
    return [name for name in names if name not in left_out]


def _read_part(folder: Place, records: CommitReader) -> WriterInfo:
    attempt, rank = parse_writer_name(folder.name) or (0, 0)
    return WriterInfo(folder.name, rank, attempt, folder, records.read(folder))
