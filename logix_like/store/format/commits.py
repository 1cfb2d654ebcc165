"""The record of what was committed: an append-only file of checksummed lines.

What is durable when: a chunk's files are written first, each of them atomically; then one line that names them, with
their checksums. From that line on the rows exist, for every reader and for ever; rows that no line names do not exist,
whatever else lies in the store. With ``durability="process"`` this holds when the writing process dies at any instant;
with ``"commit"``, which forces files, folders and the line to the disk in this order, also when the machine does. In an
object store each line is an object of its own that is created on the condition that there is none of its number.

Each line is eight hex digits (CRC-32C of the rest), a blank and a JSON object with its ``sequence``
number. A line is written with one call after everything that it names is written, so a kill can
only tear the last line; a bad line before the last is damage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from logix_like.errors import StoreDamagedError
from logix_like.store.format.arrays import remedy
from logix_like.store.format.documents import sealed_line, unsealed, unsealed_line
from logix_like.store.format.schema import COMMITS, DOCUMENT, GRADIENTS, TAILS
from logix_like.store.places.files import Place, exists, files_of, read_bytes, read_records
from logix_like.timing import NOTHING, Timing

_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_PART = re.compile(rf"({TAILS}/[0-9]{{1,12}})?", re.ASCII)
_ARRAY = re.compile(r"(metadata/)?(?!\.{1,2}$)[A-Za-z0-9_.~@%-]+", re.ASCII)


@dataclass(frozen=True)
class RowsRecord:
    """A chunk of rows that exists."""

    sequence: int
    """Number of the line, from 0."""
    part: str
    """``""`` for the writer's own arrays, ``tails/<n>`` for a short part."""
    chunk: int
    """Number of the chunk in the part's arrays."""
    start: int
    """First row in the part's arrays."""
    rows: int
    """How many rows."""
    crc: Mapping[str, int]
    """CRC-32C of the chunk's file by array; arrays that are not named have no such chunk."""
    epoch: int
    """Epoch of the last row, which tells a resumed run where it is (-1 unknown)."""
    step: int
    """Step of the last row (-1 unknown)."""
    codec: str = "none"
    """How the gradients are compressed."""
    timing: Timing = NOTHING
    """What the training took since the record before, and logging of it; nothing in records of early versions."""

    def within(self, folder: Place) -> Place:
        """The folder of the arrays that hold the chunk, of a writer's ``folder``."""
        return folder / self.part if self.part else folder


@dataclass(frozen=True)
class StatisticsRecord:
    """From here on ``statistics/<generation>`` holds the writer's statistics."""

    sequence: int
    """Number of the line."""
    generation: int
    """Which folder."""
    watermark: int
    """How many of the writer's rows it covers."""


@dataclass(frozen=True)
class CloseRecord:
    """The writer was closed: no line follows, and none before it can be a torn one."""

    sequence: int
    """Number of the line."""
    closed: bool = True
    """Marks the line."""


@dataclass(frozen=True)
class ReplacesRecord:
    """The part holds the rows of others, which are not read any more once it is closed."""

    sequence: int
    """Number of the line."""
    replaces: tuple[str, ...]
    """Names of the others."""


@dataclass(frozen=True)
class GoneRecord:
    """Stands where a repair took a record out, so that those behind it keep their numbers."""

    sequence: int
    """Number of the line."""
    gone: bool = True
    """Marks the line."""


Record = RowsRecord | StatisticsRecord | CloseRecord | ReplacesRecord | GoneRecord


@dataclass(frozen=True)
class Commits:
    """What a record file says."""

    rows: tuple[RowsRecord, ...] = ()
    """Committed chunks in row order."""
    statistics: StatisticsRecord | None = None
    """The latest statistics, if any were written."""
    closed: bool = False
    """Whether the writer was closed."""
    replaces: tuple[str, ...] = ()
    """Names of the parts in whose place this one stands, once it is closed."""
    torn: bool = False
    """Whether a torn last line was dropped."""
    spoilt: bool = False
    """Whether that line was written whole, which no kill leaves: bits of it changed afterwards."""
    length: int = 0
    """How many records there are, of all kinds."""
    gone: int = 0
    """How many of them stand before the latest statistics for one that a repair took out."""
    unreadable: tuple[str, ...] = ()
    """What is wrong with lines that were left out, in a record that is read as far as it can be."""

    @property
    def total(self) -> int:
        """Number of committed rows."""
        return sum(record.rows for record in self.rows)


class CommitLog:
    """Appends records to a part's file; one owner."""

    def __init__(self, folder: Place, *, sync: bool = False) -> None:
        self._file = files_of(folder).records(folder / COMMITS, sync=sync)
        self.sequence = 0
        """Number of the next record."""

    def append(self, record: Record) -> None:
        """Write one record; when this returns, what it names is committed."""
        self._file.append(format_record(record))
        self.sequence += 1

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()


def format_record(record: Record) -> bytes:
    """A record as a line, without its end."""
    return sealed_line(asdict(record))


def read_commits(folder: Place) -> Commits:
    """Read the record file of a part; a part without one has no rows.

    Raises :class:`StoreDamagedError` naming file and line when a line before the last is bad, or
    when there are chunks and no record.
    """
    file = folder / COMMITS
    try:
        content = read_records(file)
    except FileNotFoundError:
        if exists(folder / GRADIENTS):
            raise StoreDamagedError(f"{file} is missing, but the part has rows; {remedy(file)}") from None
        return Commits()
    except OSError as error:
        raise StoreDamagedError(f"{file} cannot be read: {error}; {remedy(file)}") from error
    lines = content.split(b"\n")
    unfinished = lines.pop()
    records: list[Record] = []
    for number, line in enumerate(lines):
        try:
            records.append(_parse(line, number))
        except _UNREADABLE as error:
            if number == len(lines) - 1 and not unfinished:
                # A power cut can leave zeros in a line's place, a kill only its beginning.
                return _collect(records, torn=True, spoilt=b"\0" not in line)
            raise StoreDamagedError(
                f"{file}, line {number + 1}: the record is damaged ({error}) and is not the last one; {remedy(file)}"
            ) from error
    return _collect(records, torn=bool(unfinished), spoilt=_is_whole(unfinished, len(records)))


class CommitReader:
    """Reads record files again only when they have changed, so that following a live store is cheap."""

    def __init__(self, *, salvages: bool = False) -> None:
        self._known: dict[Place, tuple[Hashable, Commits]] = {}
        self._salvages = salvages

    def read(self, folder: Place) -> Commits:
        """As :func:`read_commits`; or, of a damaged record, every line that can be read."""
        stamp = files_of(folder).stamp(folder / COMMITS)  # taken first: what is appended meanwhile is read next time
        known = self._known.get(folder)
        if known is None or stamp is None or known[0] != stamp:
            known = (stamp, self._read(folder))
            self._known[folder] = known
        return known[1]

    def _read(self, folder: Place) -> Commits:
        try:
            return read_commits(folder)
        except StoreDamagedError as error:
            if not self._salvages:
                raise
            return _salvaged(folder, error)


def salvage_records(folder: Place) -> tuple[list[Record], list[str]]:
    """Every record of a part that is as it was written, by its number, and what is wrong with the other lines.

    Between them :class:`GoneRecord` stands for those that are not to be read. Which parts a merged one replaces is
    also told by its document: without that, their rows would count twice.
    """
    records: dict[int, Record] = {}
    findings = []
    lines = read_records(folder / COMMITS).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            found = _parse(line, None)
            if found.sequence > len(lines):
                raise ValueError(f"it has number {found.sequence}, of {len(lines)} lines")
            if records.setdefault(found.sequence, found) is not found:
                raise ValueError(f"it has number {found.sequence}, as a line before it")
        except _UNREADABLE as error:
            findings.append(f"line {number} is no record ({error})")
    if told := _replaced(folder):
        records[0] = ReplacesRecord(0, told)
    return [records.get(number, GoneRecord(number)) for number in range(1 + max(records, default=-1))], findings


def _replaced(folder: Place) -> tuple[str, ...]:
    """The parts that a merged one replaces, by its document; none where that is damaged."""
    try:
        return tuple(map(str, unsealed(read_bytes(folder / DOCUMENT)).get("replaces", ())))
    except (OSError, *_UNREADABLE):
        return ()


def _salvaged(folder: Place, error: StoreDamagedError) -> Commits:
    try:
        records, findings = salvage_records(folder)
    except FileNotFoundError:  # rows without a record of them
        return Commits(unreadable=(str(error),))
    told = tuple(f"{folder / COMMITS}: {finding}; its rows are left out" for finding in findings)
    return replace(_collect(records, torn=False), unreadable=told or (str(error),))


def _is_whole(unfinished: bytes, number: int) -> bool:
    """Whether a line without an end is a record whose end is another character now."""
    try:
        _parse(unfinished[:-1], number)
    except _UNREADABLE:
        return False
    return True


def _collect(records: list[Record], *, torn: bool, spoilt: bool = False) -> Commits:
    statistics = [record for record in records if isinstance(record, StatisticsRecord)]
    closed = bool(records) and isinstance(records[-1], CloseRecord)
    gone = [
        one for one in records if isinstance(one, GoneRecord) and statistics and one.sequence < statistics[-1].sequence
    ]
    return Commits(
        rows=tuple(record for record in records if isinstance(record, RowsRecord)),
        statistics=statistics[-1] if statistics else None,
        closed=closed,
        replaces=tuple(name for one in records if isinstance(one, ReplacesRecord) for name in one.replaces),
        torn=torn,
        spoilt=spoilt,
        length=len(records),
        gone=len(gone),
    )


def _parse(line: bytes, number: int | None) -> Record:
    """The record in a line, of this number or (None) of any."""
    entry = unsealed_line(line)
    if number is None:
        number = _count(entry, "sequence")
    if entry["sequence"] != number:
        raise ValueError(f"it has number {entry['sequence']!r}, expected {number}")
    if "closed" in entry:
        return CloseRecord(number)
    if "replaces" in entry:
        return ReplacesRecord(number, tuple(map(str, entry["replaces"])))
    if "gone" in entry:
        return GoneRecord(number)
    if "generation" in entry:
        return StatisticsRecord(number, _count(entry, "generation"), _count(entry, "watermark"))
    return _rows_record(entry, number)


def _rows_record(entry: Mapping[str, Any], number: int) -> RowsRecord:
    part, arrays = entry["part"], entry["crc"]
    if not _PART.fullmatch(part):
        raise ValueError(f"it names the part {part!r}")
    for name in arrays:
        if not _ARRAY.fullmatch(name):
            raise ValueError(f"it names the array {name!r}")
    counts = {key: _count(entry, key) for key in ("chunk", "start", "rows")}
    if counts["rows"] < 1:
        raise ValueError("it has no rows")
    crc = {name: int(value) for name, value in arrays.items()}
    epoch, step, codec = int(entry["epoch"]), int(entry["step"]), str(entry["codec"])
    timing = _timing(entry.get("timing", {}))
    return RowsRecord(number, part, crc=crc, epoch=epoch, step=step, codec=codec, timing=timing, **counts)


def _timing(entry: Mapping[str, Any]) -> Timing:
    seconds, logging = (float(entry.get(name, 0)) for name in ("seconds", "logging"))
    if not 0 <= logging <= seconds < math.inf:
        raise ValueError(f"its timing is {entry!r}")
    return Timing(seconds, logging)


def _count(entry: Mapping[str, Any], key: str) -> int:
    value = entry[key]
    if not isinstance(value, int) or not 0 <= value < 1 << 53:
        raise ValueError(f"its {key} is {value!r}")
    return value
