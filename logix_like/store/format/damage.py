"""Which committed chunks are still as they were committed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from logix_like.errors import StoreDamagedError
from logix_like.store.format.arrays import chunk_file, read_chunk
from logix_like.store.format.commits import Commits, RowsRecord
from logix_like.store.format.schema import COLUMNS, COORDINATE_SCALE, GRADIENTS, SCALE, TAILS, WRITER_COLUMNS
from logix_like.store.places.files import CHECKSUM_BYTES, Place, exists, file_size, names_in

_CHUNK = re.compile(r"c\.[0-9]{1,12}\.0", re.ASCII)
_WIDE = (GRADIENTS, COLUMNS, SCALE, COORDINATE_SCALE)


def array_file(folder: Place, record: RowsRecord, array: str) -> Place:
    """The file of a committed chunk of one of a part's arrays."""
    return chunk_file(record.within(folder) / array, record.chunk, 2 if array in _WIDE else 1)


def damaged_files(folder: Place, record: RowsRecord, first: int) -> Iterator[StoreDamagedError]:
    """What is wrong with the files of a committed chunk, whose first row is row ``first`` of the store."""
    for array, crc in record.crc.items():
        try:
            read_chunk(
                array_file(folder, record, array), f"{array} of rows {first} to {first + record.rows - 1}", crc=crc
            )
        except StoreDamagedError as error:
            yield error


def written_chunks(folder: Place) -> list[tuple[str, int]]:
    """``(part, number)`` of every chunk of gradients in a part and its tails, as a commit record names them.

    To be listed before the record is read: a live writer then has named all of them but the last.
    """
    full = sorted(int(name.split(".")[1]) for name in names_in(folder / GRADIENTS) if _CHUNK.fullmatch(name))
    tails = [name for name in names_in(folder / TAILS) if name.isdecimal()]
    return [*(("", number) for number in full), *((f"{TAILS}/{name}", 0) for name in tails)]


def unrecorded_files(folder: Place, written: Iterable[tuple[str, int]], commits: Commits) -> list[Place]:
    """Those of the chunks ``written`` that the record does not name though its writer wrote others after them.

    A writer that was killed leaves at most one chunk without its record; more say that lines of the record are gone.
    """
    recorded = {(record.part, record.chunk) for record in commits.rows}
    files = [_chunk(folder, *one, GRADIENTS) for one in written if one not in recorded]
    found = [file for file in files if exists(file)]  # a tail's folder is there before its chunk
    return found if len(found) > 1 else []


def unrecorded_rows(folder: Place, commits: Commits) -> int:
    """How many rows lie in chunks that the record does not name, by the sizes of their columns."""
    recorded = {(record.part, record.chunk) for record in commits.rows}
    rows = 0
    for one in written_chunks(folder):
        if one not in recorded:
            with suppress(OSError):
                size = file_size(_chunk(folder, *one, COLUMNS))
                rows += (size - CHECKSUM_BYTES) // (8 * len(WRITER_COLUMNS))
    return rows


def _chunk(folder: Place, part: str, number: int, array: str) -> Place:
    return chunk_file((folder / part if part else folder) / array, number, 2)


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
