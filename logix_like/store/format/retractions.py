"""Rows taken back after their commit: a training went back to an older checkpoint, or samples are to be forgotten.

The rows' files are never touched. Each retraction is one small sealed document, ``retractions/<digest>.json``,
written in one atomic step and never changed; it names the commits that it reaches, so that rows logged later are
free of it, and so that documents need no order among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from logix_like.errors import StoreDamagedError
from logix_like.layout import DataId
from logix_like.store.format.attempts import MERGED_RANK, parse_writer_name
from logix_like.store.format.checkpoints import CheckpointRecord, list_checkpoints
from logix_like.store.format.commits import read_commits
from logix_like.store.format.documents import sealed, unsealed
from logix_like.store.format.schema import RETRACTIONS, WRITERS
from logix_like.store.places.files import named_errors, names_in, read_bytes, write_file
from logix_like.store.places.storage import Place

EVERY_RECORD = 1 << 53
"""More than a part has."""


@dataclass(frozen=True)
class Retraction:
    """Rows of some commits that do not count any more."""

    digest: str
    """Identifies it, and names its file."""
    reach: Mapping[str, int]
    """By writer: its commit records with a lower number are reached."""
    checkpoints: int
    """Checkpoints up to this number are reached."""
    step: int | None = None
    """Rows that were logged at this optimizer step or a later one; None: see ``data_id``."""
    data_id: frozenset[DataId] = frozenset()
    """Rows of these samples."""

    def reaches(self, writer: str, sequence: int) -> bool:
        """Whether it concerns a commit record."""
        return sequence < self.reach.get(writer, 0)

    def takes(self, step: np.ndarray, data_id: Callable[[], np.ndarray]) -> np.ndarray:
        """Mask of the rows that are taken back, by their steps, or their ids where it is these that matter."""
        if self.step is not None:
            return np.asarray(step >= self.step)
        return np.fromiter((one in self.data_id for one in data_id()), bool, len(step))

    def drops(self, checkpoint: CheckpointRecord) -> bool:
        """Whether a checkpoint holds weights of the part of a training that was gone back on."""
        return self.step is not None and checkpoint.number <= self.checkpoints and checkpoint.step > self.step


def retract_steps(store: Place, step: int) -> Retraction:
    """Take back all rows logged so far at optimizer step ``step`` (counted from 0) or later; on the disk on return."""
    return _write(store, {"step": step})


def retract_ids(store: Place, ids: Iterable[DataId]) -> Retraction:
    """Take back all rows logged so far of the samples ``ids``; on the disk on return."""
    return _write(store, {"data_id": sorted(set(ids), key=lambda one: (isinstance(one, str), one))})


def read_retractions(store: Place) -> tuple[Retraction, ...]:
    """All retractions of a store, in the order of their digests.

    Raises :class:`StoreDamagedError` naming a document that is not as it was written.
    """
    return tuple(read_retraction(file) for file in retraction_files(store))


def retraction_files(store: Place) -> list[Place]:
    """The documents of a store's retractions."""
    folder = store / RETRACTIONS
    return [folder / name for name in names_in(folder) if name.endswith(".json") and not name.startswith(".")]


def read_retraction(file: Place) -> Retraction:
    """One retraction; raises :class:`StoreDamagedError`."""
    try:
        entry = unsealed(read_bytes(file))
        retraction = _parse(entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise StoreDamagedError(f"{file} cannot be read ({error}); restore it from a copy") from error
    if retraction.digest != file.stem:
        raise StoreDamagedError(f"{file} says that it is {retraction.digest!r}; restore it from a copy")
    return retraction


def standing_checkpoints(store: Place, retractions: Collection[Retraction]) -> tuple[CheckpointRecord, ...]:
    """A store's checkpoints without those of a part of the training that was gone back on."""
    return tuple(one for one in list_checkpoints(store) if not any(r.drops(one) for r in retractions))


def _write(store: Place, what: Mapping[str, Any]) -> Retraction:
    reach = {name: read_commits(store / WRITERS / name).length for name in _parts(store, merged=False)}
    numbers = [record.number for record in list_checkpoints(store)]
    while True:
        # Whatever a merge writes, now or later, was logged before.
        merged = _parts(store, merged=True)
        entry = {**what, "reach": reach | dict.fromkeys(merged, EVERY_RECORD), "checkpoints": max(numbers, default=0)}
        retraction = _parse(entry)
        file = store / RETRACTIONS / f"{retraction.digest}.json"
        with named_errors(file):
            write_file(file, [sealed({"attributes": entry})], sync=True)
        if _parts(store, merged=True) == merged:  # else a merge has begun meanwhile, which may not have read this one
            return retraction


def _parts(store: Place, *, merged: bool) -> list[str]:
    names = names_in(store / WRITERS)
    return [name for name in names if (one := parse_writer_name(name)) and (one[1] == MERGED_RANK) == merged]


def _parse(entry: Mapping[str, Any]) -> Retraction:
    content = {key: value for key, value in entry.items() if key in ("reach", "checkpoints", "step", "data_id")}
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
    step, ids = content.get("step"), content.get("data_id", [])
    if (step is None) == (not ids) or not all(isinstance(one, str | int) for one in ids):
        raise ValueError("it names neither a step nor samples, or both")
    return Retraction(
        digest,
        reach={str(writer): int(number) for writer, number in content["reach"].items()},
        checkpoints=int(content["checkpoints"]),
        step=None if step is None else int(step),
        data_id=frozenset(ids),
    )
