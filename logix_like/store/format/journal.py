"""The journal of a recorded training: one checksummed line for each optimizer step, a file for each attempt.

A kill can tear only the last line of a file, and the next attempt writes a file of its own. Where an attempt goes on
from before the end of the last one, its steps take the place of those. Of processes that train together each writes its
part of every batch into a file of its own; a step counts once it is in all of them.
"""

from __future__ import annotations

import itertools
import json
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from logix_like.errors import StoreDamagedError, StoreError, StoreWriteError
from logix_like.path import Checkpoint, PathBlock, PathStep, StoredCheckpoint, TrainingPath
from logix_like.ranks import Ranks
from logix_like.store.format.checkpoints import CheckpointRecord, load_checkpoint
from logix_like.store.format.documents import sealed_line, unsealed_line
from logix_like.store.format.retractions import read_retractions, standing_checkpoints
from logix_like.store.format.schema import JOURNAL
from logix_like.store.places.files import files_of, make_folder, named_errors, names_in, read_records
from logix_like.store.places.storage import Place

_FILE = re.compile(r"(\d+)(?:-(\d+))?\.jsonl")
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class PathJournal:
    """Writes the steps of one attempt, as one of ``size`` processes; a line is on its way to the disk on return.

    ``earlier`` is the number of the last checkpoint before the attempt (0: there was none).
    """

    def __init__(
        self, store: Place, attempt: int, optimizer: str, groups: Sequence[Sequence[str]], ranks: Ranks, earlier: int
    ) -> None:
        folder = store / JOURNAL
        self._file = folder / (f"{attempt}.jsonl" if ranks.size == 1 else f"{attempt}-{ranks.rank}.jsonl")
        with named_errors(self._file):
            make_folder(folder)
            self._records = files_of(folder).records(self._file)
        # A training may break off anywhere; nothing is left open by it.
        weakref.finalize(self, self._records.close)
        self._settings: object = None
        told = {"optimizer": optimizer, "groups": [list(group) for group in groups]}
        self._write({**told, "processes": ranks.size, "earlier": earlier})

    def append(self, step: PathStep) -> None:
        """Write one step; settings that have not changed since the last one are left out."""
        entry = asdict(step)
        settings = json.loads(json.dumps(entry["settings"]))
        if settings == self._settings:
            del entry["settings"]
        self._write(entry)
        self._settings = settings

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self._records.append(sealed_line(entry))
        except OSError as error:
            self._records.close()  # part of the line may be there, and nothing is to follow it
            raise StoreWriteError(
                f"the path could not be recorded in {self._file}: {error}; see to the disk"
            ) from error


def read_path(store: Place) -> TrainingPath:
    """The recorded training of a store.

    Raises:
        StoreError: none was recorded, or a part between its steps is missing.
        StoreDamagedError: a line is not as it was written.
    """
    header: dict[str, Any] = {}
    steps: list[PathStep] = []
    checkpoints = standing_checkpoints(store, read_retractions(store))
    for files in _attempts(store).values():
        parts = [part for file in files if (part := read_journal(file)) is not None]
        if parts and len(parts) == parts[0][0]["processes"]:  # else one was killed before its first line
            header, found = parts[0][0], _joined([part for _, part in parts])
            if found:
                begin, earlier = found[0].step, header["earlier"]
                steps = [step for step in steps if step.step < begin] + found
                checkpoints = tuple(c for c in checkpoints if c.number > earlier or c.step <= begin)
    if not steps:
        raise StoreError(
            f"{store} holds no recorded path; train with 'record: path' in the config and init(optimizer=...)"
        )
    _require_no_gap(store, steps)
    groups = tuple(tuple(group) for group in header["groups"])
    return TrainingPath(header["optimizer"], groups, tuple(steps), _by_step(store, checkpoints))


def journals(store: Place) -> list[Place]:
    """The files of a store's journal in order."""
    return [file for files in _attempts(store).values() for file in files]


def next_attempt(store: Place) -> int:
    """The number of an attempt that begins now."""
    return 1 + max(_attempts(store), default=0)


def read_journal(file: Place) -> tuple[dict[str, Any], list[PathStep]] | None:
    """An attempt's header and steps; None where it was torn before the header was complete."""
    *lines, unfinished = read_records(file).split(b"\n")
    if _is_line(unfinished[:-1]):
        raise StoreDamagedError(f"{file}, line {len(lines) + 1}: its end is no end of a line; restore it from a copy")
    entries = [_entry(file, number, line, last=number == len(lines)) for number, line in enumerate(lines, 1)]
    whole = [entry for entry in entries if entry is not None]
    if not whole:
        return None
    header, steps = whole[0], []
    settings: tuple[Mapping[str, Any], ...] = ()
    try:
        [str(name) for group in header["groups"] for name in group]
        for entry in whole[1:]:
            settings = tuple(dict(group) for group in entry["settings"]) if "settings" in entry else settings
            blocks = tuple(PathBlock(tuple(b["data_id"]), float(b["weight"])) for b in entry["blocks"])
            steps.append(PathStep(int(entry["step"]), int(entry["epoch"]), blocks, settings))
    except _UNREADABLE as error:
        raise StoreDamagedError(f"{file} lacks or garbles a field ({error!r}); restore it from a copy") from error
    known = {"optimizer": str(header["optimizer"]), "groups": header["groups"]}
    numbers = {"processes": int(header.get("processes", 1)), "earlier": int(header.get("earlier", 0))}
    return {**known, **numbers}, steps


def _entry(file: Place, number: int, line: bytes, *, last: bool) -> dict[str, Any] | None:
    try:
        return unsealed_line(line)
    except _UNREADABLE as error:
        if last and b"\0" in line:  # what a power cut leaves in a line's place
            return None
        raise StoreDamagedError(
            f"{file}, line {number}: the record is damaged ({error}); restore the file from a copy"
        ) from error


def _is_line(line: bytes) -> bool:
    try:
        unsealed_line(line)
    except _UNREADABLE:
        return False
    return True


def _attempts(store: Place) -> dict[int, list[Place]]:
    """The files of each attempt, in the order of its processes."""
    folder = store / JOURNAL
    found: dict[int, dict[int, Place]] = {}
    for name in names_in(folder):
        if match := _FILE.fullmatch(name):
            found.setdefault(int(match[1]), {})[int(match[2] or 0)] = folder / name
    return {attempt: [files[rank] for rank in sorted(files)] for attempt, files in sorted(found.items())}


def _joined(parts: Sequence[Sequence[PathStep]]) -> list[PathStep]:
    """Steps that all processes took, each with the samples of all."""
    by_step = [{step.step: step for step in part} for part in parts]
    common = [step for step in parts[0] if all(step.step in part for part in by_step)]
    return [
        replace(step, blocks=tuple(block for part in by_step for block in part[step.step].blocks)) for step in common
    ]


def _require_no_gap(store: Place, steps: Sequence[PathStep]) -> None:
    for before, after in itertools.pairwise(steps):
        if after.step != before.step + 1:
            raise StoreError(
                f"the path in {store} has step {after.step} behind step {before.step}: what lies between was not "
                "recorded (training went on elsewhere, or from a later point); record a path without a gap"
            )


def _by_step(store: Place, records: Iterable[CheckpointRecord]) -> tuple[StoredCheckpoint, ...]:
    def reader(record: CheckpointRecord) -> StoredCheckpoint:
        return StoredCheckpoint(record.number, record.step, lambda: load_state(store, record))

    by_step = {record.step: reader(record) for record in records}
    return tuple(by_step[step] for step in sorted(by_step))


def load_state(store: Place, record: CheckpointRecord) -> Checkpoint:
    """A checkpoint's weights and moments."""
    return Checkpoint.of(load_checkpoint(store, record.number), record.step, record.epoch)
