"""A score as a sum over parts of the model: its modules, or its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from logix_like.layout import Layout


@dataclass(frozen=True, eq=False)
class Parts:
    """Which columns of a row belong to which part."""

    names: tuple[str, ...]
    """The parts, in the model's order."""
    blocks: tuple[tuple[slice, int], ...]
    """Columns of each module, with the number of its part."""

    def products(self, rows: Tensor, queries: Tensor) -> Tensor:
        """``[queries, n, parts]``: inner products of ``rows [n, width]`` and ``queries [queries, width]`` by part."""
        result = torch.zeros(len(self.names), len(queries), len(rows), dtype=rows.dtype)
        for columns, part in self.blocks:
            result[part] += queries[:, columns] @ rows[:, columns].T
        return result.permute(1, 2, 0)


def layer_of(module: str) -> str:
    """A module's name up to its last number: ``model.layers.3`` of ``model.layers.3.mlp.up``.

    A name without a number is a layer by itself.
    """
    segments = module.split(".")
    numbered = [place for place, segment in enumerate(segments) if segment.isdecimal()]
    return ".".join(segments[: numbered[-1] + 1]) if numbered else module


PARTS: Mapping[str, Callable[[str], str]] = MappingProxyType({"module": str, "layer": layer_of})
"""By the name of a division: the part that a module belongs to."""


def parts_of(layout: Layout, per: str) -> Parts:
    """The parts of a model, by a key of :data:`PARTS`."""
    owners = [PARTS[per](block.name) for block in layout]
    names = _unique(owners)
    numbers = {name: number for number, name in enumerate(names)}
    return Parts(names, tuple((block.columns, numbers[own]) for block, own in zip(layout, owners, strict=True)))


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
