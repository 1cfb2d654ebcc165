"""The projection matrices of every block: made when first needed, or read from a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from logix_like.capture.layers import Side
from logix_like.capture.selection import BlockShape, Use
from logix_like.layout import Layout, ModuleBlock
from logix_like.projection import Init, largest_coordinates, rank_for


@dataclass(frozen=True)
class Projection:
    """The two matrices of one block; None is the identity."""

    input: Tensor | None
    """``[rank_in, d_in]``, float32."""
    output: Tensor | None
    """``[rank_out, d_out]``, float32."""


class Projector:
    """Owns the blocks' matrices and, with them, the layout of a row."""

    def __init__(
        self,
        blocks: Sequence[BlockShape],
        init: Init,
        *,
        rank: int | Mapping[str, int] | Literal["auto"],
        seed: int,
    ) -> None:
        self._blocks = {block.name: block for block in blocks}
        self._init = init
        self._seed = seed
        self._groups: dict[str, str] = {}
        self._matrices: dict[str, Projection] = {}
        self._sides: dict[tuple[object, ...], tuple[Side, Side]] = {}
        self._moments: Mapping[str, tuple[Tensor, Tensor]] = {}
        self._ranks = {
            b.name: (init.capped(r, b.shape[0]), init.capped(r, b.shape[1]))
            for b in blocks
            for r in (rank_for(b.name, b.shape, rank),)
        }
        self._kept: dict[str, tuple[int, ...]] = {}
        if init.picks:  # which ones is known after the warm-up
            for b in blocks:
                r = rank_for(b.name, b.shape, rank)
                self._kept[b.name] = tuple(range(min(r, b.shape[0]) * min(r, b.shape[1])))
        self.capped = {b.name for b in blocks if not min(self._ranks[b.name]) >= rank_for(b.name, b.shape, rank)}
        """Blocks whose rank is smaller than asked for, because a dimension is."""

    def restore(self, layout: Layout, stored: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> None:
        """Take a store's layout and matrices instead of making new ones.

        Raises:
            ModelMismatchError: the model's blocks are not the stored ones (naming the first difference).
        """
        layout.require_same(_with_ranks(self.layout(), layout))
        for block in layout:
            self._groups[block.name] = block.input_group
            self._ranks[block.name] = block.rank
            self._matrices[block.name] = Projection(*stored[block.name])
            if block.coordinates is not None:
                self._kept[block.name] = block.coordinates
        self._sides.clear()

    @property
    def needs_moments(self) -> bool:
        """Whether matrices can be made only after a warm-up."""
        return self._init.needs_moment and not self._moments and not self._matrices

    def fit(self, moments: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take the mean second moments ``(input, output)`` of every block."""
        self._moments = moments
        if self._kept:
            count = sum(map(len, self._kept.values()))
            self._kept = largest_coordinates(moments, self._ranks, count)
        self._sides.clear()

    def group(self, block: str) -> str | None:
        """The group whose input projection ``block`` uses, None if it has not been decided."""
        return self._groups.get(block)

    def may_share(self, block: str, other: str) -> bool:
        """Whether two blocks' input projections have one shape."""
        mine, theirs = self._blocks[block], self._blocks[other]
        same = mine.shape[1] == theirs.shape[1] and mine.bias == theirs.bias
        return same and self._ranks[block][1] == self._ranks[other][1]

    def assign(self, block: str, group: str) -> None:
        """Decide once and for all which group's input projection ``block`` uses."""
        self._groups[block] = group

    def layout(self) -> Layout:
        """The row's layout; a block without a group is its own."""
        blocks, offset = [], 0
        for shape in self._blocks.values():
            block = ModuleBlock(
                name=shape.name,
                kind=shape.kind,
                shape=shape.shape,
                rank=self._ranks[shape.name],
                offset=offset,
                input_group=self._groups.get(shape.name, shape.name),
                tied=shape.tied,
                parameters=shape.parameters,
                coordinates=self._kept.get(shape.name),
            )
            blocks.append(block)
            offset += block.size
        return Layout(blocks)

    def projection(self, block: str) -> Projection:
        """Both matrices of ``block``, made now if they do not exist yet."""
        if block not in self._matrices:
            shape, (rank_out, rank_in) = self._blocks[block], self._ranks[block]
            group = self._groups.setdefault(block, block)
            input_moment, output_moment = (None, None)
            if self._moments:
                input_moment, output_moment = self._moments[group][0], self._moments[block][1]
            self._matrices[block] = Projection(
                self._init.matrix(f"{self._seed}/{group}/input", rank_in, shape.shape[1], input_moment),
                self._init.matrix(f"{self._seed}/{block}/output", rank_out, shape.shape[0], output_moment),
            )
        return self._matrices[block]

    def sides(self, use: Use, dtype: torch.dtype, device: torch.device) -> tuple[Side, Side]:
        """How ``use`` projects its module's input and its output's gradient."""
        key = (use, dtype, device)
        if key not in self._sides:
            projection, shape = self.projection(use.block), self._blocks[use.block]
            self._sides[key] = _sides(use, shape, projection, dtype, device)
        return self._sides[key]

    def raw_sides(self, use: Use, dtype: torch.dtype, device: torch.device) -> tuple[Side, Side]:
        """The same with nothing projected, as a warm-up needs it."""
        return _sides(use, self._blocks[use.block], Projection(None, None), dtype, device)


def _sides(
    use: Use, shape: BlockShape, projection: Projection, dtype: torch.dtype, device: torch.device
) -> tuple[Side, Side]:
    def moved(matrix: Tensor | None) -> Tensor | None:
        return None if matrix is None else matrix.to(device, dtype)

    d_out, columns = shape.shape
    width = columns - shape.bias
    matrix, bias = moved(projection.input), None
    if shape.bias and matrix is None:
        bias = torch.zeros(columns, dtype=dtype, device=device)
        bias[-1] = float(use.bias)
    elif use.bias and matrix is not None:
        bias = matrix[:, -1].contiguous()
    if matrix is not None:
        matrix = matrix[:, :width].contiguous()
    inward = Side(matrix, width, bias, weight=use.weight)
    outward = Side(moved(projection.output), d_out)
    return (outward, inward) if use.transposed else (inward, outward)


def _with_ranks(mine: Layout, stored: Layout) -> Layout:
    """``mine`` with the ranks of ``stored``: ranks come from the store, not from the model."""
    if mine.names != stored.names:
        return mine
    blocks = [
        ModuleBlock(**{**vars(block), "rank": other.rank, "offset": other.offset, "coordinates": other.coordinates})
        for block, other in zip(mine, stored, strict=True)
    ]
    return Layout(blocks)
