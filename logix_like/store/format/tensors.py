"""Tensors with plain data about them in one safetensors file, under a checksum, written whole or not at all.

Curvatures are kept so, and the half-finished sums of their fits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from logix_like.errors import StoreDamagedError, StoreNotFoundError, StoreWriteError
from logix_like.store.format.schema import CURVATURE
from logix_like.store.places.files import Place, checksum, sync_folder, temporary_name, walk


def tensor_files(store: Place) -> list[Path]:
    """The curvatures of a store and the half-finished sums of their fits; an object store has none."""
    found = [Path(str(file)) for file, _ in walk(store / CURVATURE)] if isinstance(store, Path) else []
    return sorted(file for file in found if file.suffix == ".safetensors" and file.name[0] != ".")


def check_tensors(file: Path) -> None:
    """Raise :class:`StoreDamagedError` if a file is not as it was written; one tensor at a time is in memory.

    A file that is gone (a fit has ended) is no damage.
    """
    try:
        with _opened(file) as content:
            _require_seal(content, content.get_tensor)
    except StoreNotFoundError:
        return


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Write ``tensors`` and plain data ``about`` them, with a checksum over both."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    document = json.dumps(about)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, temporary, metadata={"about": document, "crc": _seal(whole, whole.__getitem__, document)})
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:  # the second where the disk is full
        raise StoreWriteError(
            f"{path} could not be written: {error}; see to the disk, or name another place"
        ) from error
    finally:
        if temporary.is_file():
            temporary.unlink()
    return path


def read_about(path: Path) -> dict[str, Any]:
    """What :func:`write_tensors` was told about the tensors; not checked against them, which are not read."""
    with _opened(path) as content:
        about: dict[str, Any] = json.loads((content.metadata() or {})["about"])
        return about


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote."""
    with _opened(path) as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        return tensors, json.loads(_require_seal(content, tensors.__getitem__))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    missing = f"there is no file {path}; fit a curvature first (fit_curvature) and save it there"
    if not path.is_file():
        raise StoreNotFoundError(missing)
    try:
        with safe_open(path, framework="pt") as content:
            yield content
    except FileNotFoundError:
        raise StoreNotFoundError(missing) from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StoreDamagedError(
            f"{path} cannot be read: {error!r}; restore it from a copy, or delete it and fit again"
        ) from error


def _require_seal(content: Any, tensor: Callable[[str], Tensor]) -> str:
    """The document of a file whose tensors and document are as they were written."""
    metadata = content.metadata() or {}
    if _seal(content.keys(), tensor, metadata["about"]) != metadata["crc"]:
        raise ValueError("it does not match its checksum")
    return str(metadata["about"])


def _seal(names: Iterable[str], tensor: Callable[[str], Tensor], document: str) -> str:
    crcs = [(name, checksum(tensor(name).reshape(-1).view(torch.uint8).numpy())) for name in sorted(names)]
    return f"{checksum(json.dumps([document, crcs]).encode()):08x}"
