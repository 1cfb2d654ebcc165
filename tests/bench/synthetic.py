"""Stores of synthetic gradients with a power-law spectrum, as large as asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from logix_like.capture.batch import ProjectedBatch
from logix_like.layout import Layout, ModuleBlock
from logix_like.query.gradients import QueryGradients
from logix_like.store import GradientStore, StoreWriter, create_store, describe, open_store

BATCH = 2000
RANK = 16
SHARED = 64
"""Directions that all modules share, so that rows look like gradients of one model."""


def layout_of(width: int) -> Layout:
    """Modules of 256 numbers each."""
    size = RANK * RANK
    blocks = (f"layers.{number}" for number in range(width // size))
    return Layout(
        tuple(
            ModuleBlock(name, "linear", (256, 256), (RANK, RANK), number * size, name)
            for number, name in enumerate(blocks)
        )
    )


class PowerLaw:
    """Draws rows whose covariance has eigenvalues ``1 / j`` and whose lengths vary as gradients' do."""

    def __init__(self, width: int, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._scales = torch.arange(1, width + 1).float().rsqrt()[torch.randperm(width, generator=self._generator)]
        self._shared = torch.randn(SHARED, width, generator=self._generator) * self._scales
        self._width = width

    def rows(self, count: int) -> Tensor:
        """``[count, width]``."""
        own = torch.randn(count, self._width, generator=self._generator) * self._scales
        common = torch.randn(count, SHARED, generator=self._generator) @ self._shared
        lengths = torch.randn(count, 1, generator=self._generator).mul(0.7).exp()
        return 1e-3 * lengths * (own + 0.3 * common)


def queries(width: int, count: int, seed: int = 1) -> QueryGradients:
    """Queries of the same kind as the rows."""
    return QueryGradients(tuple(range(count)), PowerLaw(width, seed).rows(count), layout_of(width))


def make_store(folder: Path, count: int, width: int, encoding: str = "bfloat16") -> GradientStore:
    """Write ``count`` rows; statistics are left to the query that needs them."""
    layout, source = layout_of(width), PowerLaw(width)
    create_store(folder, {})
    describe(folder, layout, encoding, {block.name: (None, None) for block in layout})
    with StoreWriter(folder, layout, encoding) as writer:
        for start in range(0, count, BATCH):
            ids = range(start, min(start + BATCH, count))
            writer.put(ProjectedBatch(tuple(ids), source.rows(len(ids))))
    return open_store(folder)
