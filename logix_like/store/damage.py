"""Which committed chunks are still as they were committed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from logix_like.errors import StoreDamagedError
from logix_like.store.arrays import chunk_file, read_chunk
from logix_like.store.commits import Commits, RowsRecord
from logix_like.store.files import Place
from logix_like.store.schema import COLUMNS, GRADIENTS, SCALE


def array_file(folder: Place, record: RowsRecord, array: str) -> Place:
    """The file of a committed chunk of one of a part's arrays."""
    part = folder / record.part if record.part else folder
    return chunk_file(part / array, record.chunk, 2 if array in (GRADIENTS, COLUMNS, SCALE) else 1)


def damaged_files(folder: Place, record: RowsRecord, first: int) -> Iterator[StoreDamagedError]:
    """What is wrong with the files of a committed chunk, whose first row is row ``first`` of the store."""
    for array, crc in record.crc.items():
        try:
            read_chunk(
                array_file(folder, record, array), f"{array} of rows {first} to {first + record.rows - 1}", crc=crc
            )
        except StoreDamagedError as error:
            yield error


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
