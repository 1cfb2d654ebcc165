"""The journal of a recorded training: one checksummed line for each optimizer step, a file for each attempt.

A kill can tear only the last line of a file, and the next attempt writes a file of its own. Where an attempt goes on
from before the end of the last one, its steps take the place of those.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from logix_like.errors import StoreDamagedError, StoreError
from logix_like.path import Checkpoint, PathBlock, PathStep, StoredCheckpoint, TrainingPath
from logix_like.store.checkpoints import CheckpointRecord, load_checkpoint
from logix_like.store.files import checksum, files_of, make_folder, names_in
from logix_like.store.retractions import read_retractions, standing_checkpoints
from logix_like.store.schema import JOURNAL
from logix_like.store.storage import Place

_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class PathJournal:
    """Writes one attempt's steps; a line is on its way to the disk when a method returns."""

    def __init__(self, store: Place, optimizer: str, groups: Sequence[Sequence[str]]) -> None:
        folder = store / JOURNAL
        make_folder(folder)
        self._file = folder / f"{1 + max((number for number, _ in _attempts(store)), default=0)}.jsonl"
        self._records = files_of(folder).records(self._file)
        # A training may break off anywhere; nothing is left open by it.
        weakref.finalize(self, self._records.close)
        self._settings: object = None
        self._write({"optimizer": optimizer, "groups": [list(group) for group in groups]})

    def append(self, step: PathStep) -> None:
        """Write one step; settings that have not changed since the last one are left out."""
        entry = asdict(step)
        settings = json.loads(json.dumps(entry["settings"]))
        if settings == self._settings:
            del entry["settings"]
        self._write(entry)
        self._settings = settings

    def _write(self, entry: Mapping[str, Any]) -> None:
        content = json.dumps(entry, separators=(",", ":")).encode()
        try:
            self._records.append(b"%08x %s" % (checksum(content), content))
        except OSError as error:
            raise StoreError(f"the path could not be recorded in {self._file}: {error}; see to the disk") from error


def read_path(store: Place) -> TrainingPath:
    """The recorded training of a store.

    Raises:
        StoreError: none was recorded, or a part between its steps is missing.
        StoreDamagedError: a line is not as it was written.
    """
    header: dict[str, Any] = {}
    steps: list[PathStep] = []
    for _, file in _attempts(store):
        attempt = read_journal(file)
        if attempt is None:
            continue
        header, found = attempt
        if found:
            steps = [step for step in steps if step.step < found[0].step] + found
    if not steps:
        raise StoreError(
            f"{store} holds no recorded path; train with 'record: path' in the config and init(optimizer=...)"
        )
    _require_no_gap(store, steps)
    groups = tuple(tuple(group) for group in header["groups"])
    return TrainingPath(header["optimizer"], groups, tuple(steps), _checkpoints(store))


def journals(store: Place) -> list[Place]:
    """The files of a store's journal in order."""
    return [file for _, file in _attempts(store)]


def read_journal(file: Place) -> tuple[dict[str, Any], list[PathStep]] | None:
    """An attempt's header and steps; None where it was torn before the header was complete."""
    lines = files_of(file).read_records(file).split(b"\n")[:-1]
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
    return {"optimizer": str(header["optimizer"]), "groups": header["groups"]}, steps


def _entry(file: Place, number: int, line: bytes, *, last: bool) -> dict[str, Any] | None:
    try:
        if line[:9] != b"%08x " % checksum(line[9:]):
            raise ValueError("its checksum does not match")
        entry: dict[str, Any] = json.loads(line[9:])
        return entry
    except _UNREADABLE as error:
        if last and b"\0" in line:  # what a power cut leaves in a line's place
            return None
        raise StoreDamagedError(
            f"{file}, line {number}: the record is damaged ({error}); restore the file from a copy"
        ) from error


def _attempts(store: Place) -> list[tuple[int, Place]]:
    folder = store / JOURNAL
    files = [folder / name for name in names_in(folder) if name.endswith(".jsonl")]
    return sorted((int(file.stem), file) for file in files if file.stem.isdecimal())


def _require_no_gap(store: Place, steps: Sequence[PathStep]) -> None:
    for before, after in itertools.pairwise(steps):
        if after.step != before.step + 1:
            raise StoreError(
                f"the path in {store} has step {after.step} behind step {before.step}: what lies between was not "
                "recorded (training went on elsewhere, or from a later point); record a path without a gap"
            )


def _checkpoints(store: Place) -> tuple[StoredCheckpoint, ...]:
    def reader(record: CheckpointRecord) -> StoredCheckpoint:
        return StoredCheckpoint(record.number, record.step, lambda: load_state(store, record))

    by_step = {record.step: reader(record) for record in standing_checkpoints(store, read_retractions(store))}
    return tuple(by_step[step] for step in sorted(by_step))


def load_state(store: Place, record: CheckpointRecord) -> Checkpoint:
    """A checkpoint's weights and moments."""
    return Checkpoint.of(load_checkpoint(store, record.number), record.step, record.epoch)
