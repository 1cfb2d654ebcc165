"""Small stores for the tests: a layout of three modules, batches with known rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import zarr
from torch import Tensor

from logix_like.capture.batch import ProjectedBatch
from logix_like.layout import DataId, Layout, ModuleBlock
from logix_like.store import Place, StoreWriter, create_store, describe

SomePlace = TypeVar("SomePlace", bound=Place)

WIDTH = 3 * 4 + 2 * 2 + 5 * 1
CHUNK_ROWS = 16


def small_layout() -> Layout:
    """Three modules of different sizes; the second reads what the first reads."""
    return Layout(
        [
            ModuleBlock("encoder.q", "linear", (6, 8), (3, 4), 0, "encoder.q", parameters=48),
            ModuleBlock("encoder.k", "linear", (6, 8), (2, 2), 12, "encoder.q", parameters=48),
            ModuleBlock("", "linear", (5, 9), (5, 1), 16, "", tied=("head",), parameters=45),
        ]
    )


def projections() -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Projections of that layout; the root module's output is the identity."""
    shared = torch.arange(32.0).reshape(4, 8)
    return {
        "encoder.q": (shared, torch.ones(3, 6)),
        "encoder.k": (shared, torch.full((2, 6), 2.0)),
        "": (torch.arange(9.0).reshape(1, 9), None),
    }


def new_store(path: SomePlace, encoding: str = "float32", layout: Layout | None = None) -> SomePlace:
    """An empty store that is described."""
    store = path
    create_store(store, {"project": "test"})
    if layout is None:
        describe(store, small_layout(), encoding, projections())
    else:
        describe(store, layout, encoding, {block.name: (None, None) for block in layout})
    return store


def chunk_mib(rows: int, encoding: str = "float32", width: int = WIDTH) -> float:
    """The setting that makes chunks of ``rows`` rows."""
    size = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}.get(encoding, 1)  # see STAGED_SHARE
    return rows * width * size / 2**20


def writer(store: Place, encoding: str = "float32", **options: Any) -> StoreWriter:
    """A writer with chunks of 16 rows."""
    options = {"chunk_mib": chunk_mib(CHUNK_ROWS, encoding), **options}
    return StoreWriter(store, small_layout(), encoding, **options)


def batches(
    rows: Tensor, ids: list[DataId] | None = None, *, size: int = 7, epoch: int = 0, step: int = 0, **more: Any
) -> Iterator[ProjectedBatch]:
    """The rows in batches of ``size``, one step each."""
    ids = list(range(len(rows))) if ids is None else ids
    for number, start in enumerate(range(0, len(rows), size)):
        part = slice(start, start + size)
        yield ProjectedBatch(
            tuple(ids[part]), rows[part], step=step + number, epoch=epoch, lr=0.5, loss=rows[part].sum(1), **more
        )


def zarr_values(array: Path) -> np.ndarray:
    """All values of an array as zarr-python reads them; a copy that may be written to."""
    return np.array(zarr.open_array(array, mode="r")[:])


def log(store: Place, rows: Tensor, encoding: str = "float32", **more: Any) -> None:
    """Write all rows with a writer of their own."""
    with writer(store, encoding) as out:
        for batch in batches(rows, **more):
            out.put(batch)
