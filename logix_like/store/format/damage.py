"""Which committed chunks are still as they were committed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from logix_like.errors import StoreDamagedError
from logix_like.store.format.arrays import chunk_file, read_chunk
from logix_like.store.format.commits import Commits, RowsRecord
from logix_like.store.format.schema import COLUMNS, COORDINATE_SCALE, GRADIENTS, SCALE, TAILS
from logix_like.store.places.files import Place, exists, names_in

_CHUNK = re.compile(r"c\.[0-9]{1,12}\.0", re.ASCII)
_WIDE = (GRADIENTS, COLUMNS, SCALE, COORDINATE_SCALE)


def array_file(folder: Place, record: RowsRecord, array: str) -> Place:
    """The file of a committed chunk of one of a part's arrays."""
    part = folder / record.part if record.part else folder
    return chunk_file(part / array, record.chunk, 2 if array in _WIDE else 1)


def damaged_files(folder: Place, record: RowsRecord, first: int) -> Iterator[StoreDamagedError]:
    """What is wrong with the files of a committed chunk, whose first row is row ``first`` of the store."""
    for array, crc in record.crc.items():
        try:
            read_chunk(
                array_file(folder, record, array), f"{array} of rows {first} to {first + record.rows - 1}", crc=crc
            )
        except StoreDamagedError as error:
            yield error


def unrecorded_files(folder: Place, commits: Commits) -> list[Place]:
    """Chunks of gradients that the record does not name though its writer wrote others after them.

    A writer that was killed leaves at most one chunk without its record; more say that lines of the record are gone.
    """
    full = [record.chunk for record in commits.rows if not record.part]
    numbers = {int(name.split(".")[1]) for name in names_in(folder / GRADIENTS) if _CHUNK.fullmatch(name)}
    files = [chunk_file(folder / GRADIENTS, number, 2) for number in sorted(numbers - set(full))]
    tails = {record.part for record in commits.rows if record.part}
    found = {f"{TAILS}/{name}" for name in names_in(folder / TAILS) if name.isdecimal()}
    files += [
        chunk_file(folder / part / GRADIENTS, 0, 2)
        for part in sorted(found - tails)
        if exists(chunk_file(folder / part / GRADIENTS, 0, 2))
    ]
    return files if len(files) > 1 else []


class IntactRows:
    """Leaves damaged chunks out of records; each chunk is read once in this object's life."""

    def __init__(self) -> None:
        self._found: dict[tuple[Place, int, str], tuple[str, ...]] = {}

    def of(self, folder: Place, commits: Commits, first: int = 0) -> Commits:
        """The record without the chunks of which any file is damaged; ``first`` counts the store's rows."""
        kept = []
        for record in commits.rows:
            key = (folder, record.sequence, repr(sorted(record.crc.items())))
            if key not in self._found:
                self._found[key] = tuple(str(error) for error in damaged_files(folder, record, first))
            if not self._found[key]:
                kept.append(record)
            first += record.rows
        return replace(commits, rows=tuple(kept))

    def findings(self, folders: Iterable[Place]) -> tuple[str, ...]:
        """What was found in these parts, a line for each file, which names the file and its rows."""
        wanted = set(folders)
        return tuple(line for (folder, *_), lines in self._found.items() if folder in wanted for line in lines)
