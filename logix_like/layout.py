"""Where each tracked parameter's numbers lie in a row: the module table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from logix_like.errors import ModelMismatchError, StoreDamagedError

DataId = str | int
"""What a user calls a sample."""


@dataclass(frozen=True)
class ModuleBlock:
    """One block of a row: the projected gradient of one module's parameters.

    The gradient of a module is seen as a matrix ``[d_out, d_in]`` (a bias is one more
    column); its projection ``P_out G P_in^T`` is a matrix ``[rank_out, rank_in]``, stored
    row by row in the columns ``offset`` to ``offset + size`` of a row.
    """

    name: str
    """Qualified name of the module in the model (``""`` is the model itself)."""
    kind: str
    """The rule that captures it, e.g. ``linear`` or ``conv``."""
    shape: tuple[int, int]
    """``(d_out, d_in)`` of the gradient matrix."""
    rank: tuple[int, int]
    """``(rank_out, rank_in)`` of the projected matrix."""
    offset: int
    """First column of the block in a row."""
    input_group: str
    """Name of the module whose input projection it shares (its own name if none)."""
    tied: tuple[str, ...] = ()
    """Further modules that use the same parameter; their gradients are added to this block."""
    parameters: int = 0
    """How many parameters of the model the block stands for."""
    coordinates: tuple[int, ...] | None = None
    """Which numbers of the projected matrix, counted row by row, are kept; None keeps all."""

    @property
    def size(self) -> int:
        """Numbers of the block: ``rank_out * rank_in``, or how many coordinates of these are kept."""
        return self.rank[0] * self.rank[1] if self.coordinates is None else len(self.coordinates)

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape in which the block's numbers are a matrix: its rank, or a single line of coordinates."""
        return self.rank if self.coordinates is None else (1, len(self.coordinates))

    @property
    def columns(self) -> slice:
        """The block's columns in a row."""
        return slice(self.offset, self.offset + self.size)


WIDEST = 2**40
"""Numbers a row: what claims more is no layout."""


class Layout(Sequence[ModuleBlock]):
    """The blocks of a row in order; ``width`` numbers in all."""

    def __init__(self, blocks: Sequence[ModuleBlock]) -> None:
        self._blocks = tuple(blocks)
        self._by_name = {block.name: block for block in self._blocks}
        if len(self._by_name) != len(self._blocks):
            raise ValueError("a module name stands twice in the layout")
        end = 0
        for block in self._blocks:
            if block.offset != end or min(*block.rank, *block.shape) < 1:
                raise ValueError(f"block {block.name!r} does not follow the one before it")
            kept = block.coordinates
            if kept is not None and (not kept or min(kept) < 0 or max(kept) >= block.rank[0] * block.rank[1]):
                raise ValueError(f"block {block.name!r} keeps coordinates that its matrix does not have")
            end += block.size
        if end > WIDEST:
            raise ValueError(f"a row has {end:,} numbers, more than the {WIDEST:,} that any memory could hold")
        self.width = end
        self._picked: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, key: Any) -> Any:
        return self._by_name[key] if isinstance(key, str) else self._blocks[key]

    def __iter__(self) -> Iterator[ModuleBlock]:
        return iter(self._blocks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._blocks == other._blocks

    def __hash__(self) -> int:
        return hash(self._blocks)

    def __repr__(self) -> str:
        return f"Layout({len(self)} modules, {self.width} numbers a row)"

    @property
    def names(self) -> tuple[str, ...]:
        """Module names in row order."""
        return tuple(block.name for block in self._blocks)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Views of ``rows [..., width]`` by module name, each ``[..., rank_out, rank_in]``.

        Where only some coordinates of that matrix are kept: ``[..., 1, size]``.
        """
        return {b.name: rows[..., b.columns].unflatten(-1, b.matrix) for b in self._blocks}

    def pick(self, name: str, matrices: Tensor) -> Tensor:
        """What a row keeps of a module's projected ``matrices [..., rank_out, rank_in]``: ``[..., size]``."""
        block = self._by_name[name]
        if block.coordinates is None:
            return matrices.flatten(-2)
        index = self._picked.get(name)
        if index is None or index.device != matrices.device:
            index = self._picked[name] = torch.tensor(block.coordinates, device=matrices.device)
        return matrices.flatten(-2).index_select(-1, index)

    def spread(self, name: str, numbers: Tensor) -> Tensor:
        """The reverse of :meth:`pick`: ``[..., rank_out, rank_in]`` with zeros where nothing is kept."""
        block = self._by_name[name]
        if block.coordinates is not None:
            whole = numbers.new_zeros(*numbers.shape[:-1], block.rank[0] * block.rank[1])
            whole[..., list(block.coordinates)] = numbers
            numbers = whole
        matrices: Tensor = numbers.unflatten(-1, block.rank)
        return matrices

    def fingerprint(self) -> str:
        """BLAKE2b-128 hex of names, kinds and shapes: the model's structure as it was logged."""
        described = [(b.name, b.kind, b.shape, b.tied) for b in self._blocks]
        return hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()

    def require_same(self, other: Layout) -> None:
        """Raise :class:`ModelMismatchError` naming the first difference from ``other``."""
        for mine, theirs in zip(self, other, strict=False):
            for field in ("name", "kind", "shape", "rank", "tied"):
                found, expected = getattr(theirs, field), getattr(mine, field)
                if found != expected:
                    raise ModelMismatchError(
                        f"module {theirs.name!r} of this model differs from the logged "
                        f"{mine.name!r}: {field} is {found!r}, logged was {expected!r}; "
                        "use the model and the module choice that the store was made with"
                    )
            if mine.coordinates != theirs.coordinates:
                raise ModelMismatchError(
                    f"module {theirs.name!r}: other coordinates of its eigenbasis were logged; use the store's own "
                    "projections (resume the run, or load it)"
                )
        if len(self) != len(other):
            longer = self if len(self) > len(other) else other
            extra = longer[min(len(self), len(other))].name
            where = "the store but not in this model" if longer is self else "this model but not in the store"
            raise ModelMismatchError(f"module {extra!r} is in {where}")

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data for the store's attributes."""
        return [asdict(block) for block in self._blocks]

    @classmethod
    def from_json(cls, table: object) -> Layout:
        """Read what :meth:`to_json` wrote; anything else is a :class:`StoreDamagedError`."""
        try:
            if not isinstance(table, list):
                raise TypeError(f"it is a {type(table).__name__}, not a list")
            return cls([_block(entry) for entry in table])
        except (TypeError, KeyError, ValueError) as error:
            raise StoreDamagedError(f"the store's module table cannot be read: {error}") from error


def _block(entry: Mapping[str, Any]) -> ModuleBlock:
    shape, rank = (tuple(int(n) for n in entry[key]) for key in ("shape", "rank"))
    if len(shape) != 2 or len(rank) != 2:
        raise ValueError(f"shape {shape} and rank {rank} must have two entries")
    coordinates = entry.get("coordinates")
    return ModuleBlock(
        coordinates=None if coordinates is None else tuple(int(n) for n in coordinates),
        name=str(entry["name"]),
        kind=str(entry["kind"]),
        shape=shape,
        rank=rank,
        offset=int(entry["offset"]),
        input_group=str(entry["input_group"]),
        tied=tuple(str(name) for name in entry["tied"]),
        parameters=int(entry["parameters"]),
    )
