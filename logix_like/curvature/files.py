"""Curvatures on disk: one safetensors file each, written whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from logix_like.curvature.curvature import Curvature, Fisher
from logix_like.errors import ConfigError, StoreDamagedError, StoreError, StoreVersionError
from logix_like.layout import Layout
from logix_like.linalg.basis import Basis
from logix_like.store.format.schema import CURVATURE
from logix_like.store.format.tensors import read_about, read_tensors, write_tensors
from logix_like.store.places.files import Place

FORMAT = 1
SIDES = ("input", "output")


def save_curvature(curvature: Curvature, path: str | Path) -> Path:
    """Write ``curvature`` to the safetensors file ``path``; a file that is there is replaced in one step."""
    return write_tensors(Path(path), *packed(curvature))


def packed(curvature: Curvature) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``curvature`` as tensors and plain data about them."""
    tensors = {f"eigenvalues/{name}": values for name, values in curvature.eigenvalues.items()}
    for block in curvature.layout:
        owners = (block.input_group, block.name)
        for side, owner, basis in zip(SIDES, owners, curvature.bases[block.name], strict=True):
            tensors |= {f"{side}/{owner}/{number}": part for number, part in enumerate(basis.parts)}
    about = {
        "format": FORMAT,
        "kind": curvature.kind,
        "layout": curvature.layout.to_json(),
        "fisher": vars(curvature.fisher),
    }
    return tensors, about


def load_curvature(path: str | Path) -> Curvature:
    """Read what :func:`save_curvature` wrote; tensors are on the CPU.

    Raises:
        StoreNotFoundError: there is no such file.
        StoreVersionError: a newer library wrote it.
        StoreDamagedError: its bytes are not those that were written.
    """
    path = Path(path)
    return unpacked(*read_tensors(path), path)


def unpacked(tensors: Mapping[str, Tensor], about: Mapping[str, Any], path: Path) -> Curvature:
    """The curvature that ``path`` holds, packed as by :func:`packed`; what else it holds is passed over."""
    if about.get("format") != FORMAT:
        raise StoreVersionError(f"{path} has the format {about.get('format')!r}; this library reads {FORMAT}")
    try:
        layout = Layout.from_json(about["layout"])
        groups = dict.fromkeys(block.input_group for block in layout)
        inward = {group: _basis(tensors, f"input/{group}") for group in groups}  # one for all that share it
        bases = {block.name: (inward[block.input_group], _basis(tensors, f"output/{block.name}")) for block in layout}
        eigenvalues = {block.name: tensors[f"eigenvalues/{block.name}"] for block in layout}
        return Curvature(about["kind"], layout, bases, eigenvalues, Fisher(**about["fisher"]))
    except (KeyError, TypeError) as error:
        raise StoreDamagedError(f"{path} lacks a part of its curvature ({error!r}); fit it again") from error


def stored_curvature(store: Place, name: str) -> Path:
    """The file of the curvature ``name`` in the folder of a store.

    Raises:
        ConfigError: the name is not that of a file, or the store is no folder.
    """
    if not isinstance(store, Path):
        raise ConfigError(
            f"{store} is an object store, and a curvature is kept in a file; use "
            "logix_like.curvature.fit_curvature and save_curvature with a path of your own (and leave "
            "'curvature' out of the config's statistics)"
        )
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise ConfigError(f"a curvature's name is {name!r}; it may have letters, digits, '_', '-' and '.'")
    return store / CURVATURE / f"{name}.safetensors"


def told_curvatures(store: Place) -> list[dict[str, Any]]:
    """Of each curvature in a store, unread: ``name, kind, labels, samples``, and whether a training ``gathered`` it.

    One that cannot be read is of the kind ``damaged``.
    """
    folder = store / CURVATURE if isinstance(store, Path) else None
    found = []
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        told = {"name": file.stem, "kind": "damaged", "labels": "-", "samples": 0, "gathered": False}
        with suppress(StoreError, KeyError, TypeError):
            about = read_about(file)
            fisher = Fisher(**about["fisher"])
            told |= {"kind": about["kind"], "labels": fisher.labels, "samples": fisher.samples}
            told["gathered"] = "stream" in about
        found.append(told)
    return found


def _basis(tensors: Mapping[str, Tensor], name: str) -> Basis:
    parts: list[Tensor] = []
    while (part := tensors.get(f"{name}/{len(parts)}")) is not None:
        parts.append(part)
    if not parts:
        raise KeyError(name)
    return Basis(tuple(parts))
