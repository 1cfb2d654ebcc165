"""Weights kept in a store, so that a query can be taken at several points of the training."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from logix_like.errors import StoreDamagedError, StoreError, StoreNotFoundError, StoreWriteError
from logix_like.store.format.arrays import write_group
from logix_like.store.format.documents import SEAL
from logix_like.store.format.schema import CHECKPOINTS, QUARANTINE
from logix_like.store.places.files import (
    Place,
    as_place,
    checksum,
    files_of,
    map_bytes,
    names_in,
    read_bytes,
    temporary_name,
    write_file,
)

_RECORD = re.compile(r"[0-9]{1,12}\.json", re.ASCII)


@dataclass(frozen=True)
class CheckpointRecord:
    """What is known of one checkpoint."""

    number: int
    """Its number, from 1."""
    step: int
    """Optimizer step at which it was taken."""
    epoch: int
    """Epoch, -1 if unknown."""
    fingerprint: str
    """Fingerprint of the model's weights."""
    size: int
    """Bytes of the file of weights."""
    crc: int
    """Its CRC-32C."""


def save_checkpoint(
    path: str | PathLike[str] | Place, state: Mapping[str, Tensor], step: int, epoch: int = -1, fingerprint: str = ""
) -> CheckpointRecord:
    """Keep the tensors of ``state`` (a ``state_dict``) as the store's next checkpoint.

    The weights' file is complete before the record that makes it a checkpoint is written, both
    to the disk itself. Tensors that share memory are written each for itself.

    Raises:
        StoreError: An entry is not a tensor.
        StoreWriteError: The file cannot be written.
    """
    folder = as_place(path) / CHECKPOINTS
    tensors = {name: _plain(name, value) for name, value in state.items()}
    try:
        write_group(folder, sync=True)
        number = 1 + last_checkpoint(as_place(path))
        size, crc = _write_weights(folder / f"{number}.safetensors", tensors)
        record = CheckpointRecord(number, step, epoch, fingerprint, size, crc)
        write_file(folder / f"{number}.json", [_seal(record.__dict__)], sync=True)
    except OSError as error:
        raise StoreWriteError(f"a checkpoint could not be written to {folder}: {error}; see to the disk") from error
    return record


def last_checkpoint(store: Place) -> int:
    """The highest number that a checkpoint has had, also of those that a repair took out; 0: there was none.

    No number is given again.
    """
    repairs = [store / QUARANTINE / name for name in names_in(store / QUARANTINE)]
    names = [name for place in (store, *repairs) for name in names_in(place / CHECKPOINTS) if _RECORD.fullmatch(name)]
    return max((int(name.partition(".")[0]) for name in names), default=0)


def list_checkpoints(path: str | PathLike[str] | Place) -> tuple[CheckpointRecord, ...]:
    """The store's checkpoints in order."""
    return tuple(sorted(map(_read_record, checkpoint_records(path)), key=lambda record: record.number))


def checkpoint_records(path: str | PathLike[str] | Place) -> list[Place]:
    """The files of the checkpoints' records, whatever is in them."""
    folder = as_place(path) / CHECKPOINTS
    return [folder / name for name in names_in(folder) if _RECORD.fullmatch(name)]


def check_record(file: Place) -> None:
    """Raise :class:`StoreDamagedError` if the record of a checkpoint is not as it was written."""
    _read_record(file)


def check_weights(record: Place) -> None:
    """Raise :class:`StoreDamagedError` if the weights that a sound record names are not as they were written."""
    try:
        entry = _read_record(record)
    except StoreDamagedError:
        return  # by which nothing can be told of the weights
    _load(record.parent, entry)


def damaged_checkpoints(path: str | PathLike[str] | Place) -> tuple[int, ...]:
    """Numbers of the checkpoints whose record or weights are not as they were written; each is read."""
    damaged = []
    for file in checkpoint_records(path):
        try:
            _load(file.parent, _read_record(file))
        except StoreDamagedError:
            damaged.append(int(file.stem))
    return tuple(sorted(damaged))


def load_checkpoint(path: str | PathLike[str] | Place, number: int) -> dict[str, Tensor]:
    """The tensors of checkpoint ``number``, on the CPU.

    Raises :class:`StoreNotFoundError` if there is no such checkpoint, :class:`StoreDamagedError` if
    its bytes are not those that were written.
    """
    known = {record.number: record for record in list_checkpoints(path)}
    if number not in known:
        listed = ", ".join(str(n) for n in known) or "none"
        raise StoreNotFoundError(f"{path} has no checkpoint {number}; there are: {listed}")
    return _load(as_place(path) / CHECKPOINTS, known[number])


def _load(folder: Place, record: CheckpointRecord) -> dict[str, Tensor]:
    file = folder / f"{record.number}.safetensors"
    try:
        content = map_bytes(file)
        if len(content) != record.size or _checksum(content) != record.crc:
            raise StoreDamagedError(f"{file} does not match its checksum; restore it from a copy")
        return load_file(file) if isinstance(file, Path) else load(bytes(content))
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreDamagedError(f"{file} cannot be read: {error}; restore it from a copy") from error


def _plain(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise StoreError(
            f"entry {name!r} of the state_dict is a {type(value).__name__}; a checkpoint holds tensors only: "
            "leave the entry out and give the rest"
        )
    # A copy of its own: safetensors refuses tensors that share memory (tied weights).
    return value.detach().to("cpu", copy=True).contiguous()


def _write_weights(file: Place, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Write the file by way of one of this machine: weights need not fit into memory twice."""
    with ExitStack() as stack:
        if isinstance(file, Path):
            temporary = temporary_name(file)
            stack.callback(temporary.unlink, missing_ok=True)
        else:
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="logix_like-"))) / file.name
        save_file(tensors, temporary)
        content = map_bytes(temporary)
        size, crc = len(content), _checksum(content)
        files_of(file).adopt(temporary, file)
    return size, crc


def _checksum(content: Any) -> int:
    """CRC-32C of a mapping; no view of it is left, so that it can be closed."""
    crc = checksum(torch.frombuffer(content, dtype=torch.uint8).numpy())
    return crc


def _seal(entry: Mapping[str, Any]) -> bytes:
    """An entry with its own checksum, as bytes."""
    seal = checksum(json.dumps(dict(entry)).encode())
    return json.dumps({**entry, SEAL: f"{seal:08x}"}).encode()


def _read_record(file: Place) -> CheckpointRecord:
    try:
        content = bytes(read_bytes(file))
        entry = json.loads(content)
        if _seal({key: value for key, value in entry.items() if key != SEAL}) != content:
            raise ValueError("it does not match its checksum")
        numbers = {key: int(entry[key]) for key in ("number", "step", "epoch", "size", "crc")}
        record = CheckpointRecord(fingerprint=str(entry["fingerprint"]), **numbers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StoreDamagedError(f"{file} cannot be read: {error!r}; restore it from a copy") from error
    if str(record.number) != file.stem:
        raise StoreDamagedError(f"{file} says that it is number {record.number}; restore it from a copy")
    return record
