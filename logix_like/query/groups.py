"""The influence of sets of samples: what the queries' losses owe to all of a set together."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logix_like.errors import QueryError
from logix_like.layout import DataId, Layout
from logix_like.preconditioner import FittedPreconditioner
from logix_like.query.scan import Candidates
from logix_like.query.table import counted

LARGEST_GROUP = 8192
"""Visits of a group in second order: a matrix of that size is solved for each module."""


@dataclass(frozen=True, eq=False)
class GroupInfluence:
    """Scores of sets of samples for queries.

    A positive score means that training on the set lowered the query's loss; negative, that it raised it. Divided by
    the number of rows of the curvature it estimates how much the loss rises when the set is left out.
    """

    query_id: tuple[DataId, ...]
    """One id for each query."""
    groups: tuple[str, ...]
    """Names of the sets."""
    sizes: tuple[int, ...]
    """How many samples each has."""
    scores: Tensor
    """``[queries, sets]``."""
    order: int
    """1: the sum of the samples' scores; 2: with the curvature of the remaining samples."""
    note: str
    """What was computed, in words."""

    def __str__(self) -> str:
        """Show a table of all scores."""
        head = f"{'set':<30} {'samples':>9}" + "".join(f" {str(query)[:12]:>12}" for query in self.query_id)
        lines = [
            f"{name[:30]:<30} {size:>9,}" + "".join(f" {score:>12.4g}" for score in self.scores[:, column].tolist())
            for column, (name, size) in enumerate(zip(self.groups, self.sizes, strict=True))
        ]
        return "\n".join(
            [f"Influence of {counted(len(self.groups), 'set', 'sets')} of samples", self.note, head, *lines]
        )


def named_groups(groups: object) -> dict[str, list[DataId]]:
    """Sets by name; one list of ids is a set called ``group``."""
    if isinstance(groups, Mapping) and groups:
        return {str(name): _ids(ids, f"the group {name!r}") for name, ids in groups.items()}
    return {"group": _ids(groups, "groups")}


def _ids(ids: Any, what: str) -> list[DataId]:
    """Each id once."""
    plain = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids
    listed = isinstance(plain, Iterable) and not isinstance(plain, str | bytes | Mapping)
    each = list(plain) if listed else []
    if not each or not all(isinstance(one, str | Integral) and not isinstance(one, bool) for one in each):
        raise QueryError(
            f"{what} is {reprlib.repr(ids)}; it must be a list of ids, or groups a mapping of names to lists of ids"
        )
    return list(dict.fromkeys(each))


def total_of(candidates: Candidates, progress: bool | None) -> Tensor:
    """``[width]``, float64: the sum of all candidates."""
    total, factor = torch.zeros(candidates.rows.layout.width, dtype=torch.float64), candidates.factor
    for tile in candidates.tiles(progress, "group"):
        rows = tile.values.double()
        total += rows.sum(0) if factor is None else factor[tile.positions].double() @ rows
    return total


def second_order(
    layout: Layout,
    preconditioner: FittedPreconditioner,
    preconditioned: Tensor,
    total: Tensor,
    held: Candidates,
    rows: int,
) -> Tensor:
    """``[queries]``: what the curvature that leaves with a set adds to the sum of its samples' scores.

    One Newton step on the remaining rows has the curvature ``P - V^T V / rows`` with ``P`` the damped curvature of all;
    by Woodbury's identity its inverse is ``P^-1 + P^-1 V^T (rows I - V P^-1 V^T)^-1 V P^-1``, module by module.

    Args:
        layout: The module table.
        preconditioner: ``P^-1``.
        preconditioned: ``[queries, width]``, ``P^-1`` applied to the queries' gradients.
        total: ``[width]``, the sum of the set's gradients.
        held: All rows of the set that the curvature holds.
        rows: How many rows the curvature is a mean of.

    Raises:
        QueryError: the rows of the set carry more curvature in a module than ``P`` has.
    """
    if held.count > LARGEST_GROUP:
        raise QueryError(
            f"a group of {held.count:,} rows is too large for order=2, which takes up to {LARGEST_GROUP:,}: ask with "
            "order=1, or split it"
        )
    visits, queries, total = held.fetch(held.positions()).double(), preconditioned.double(), total.double()
    solved = preconditioner.apply(visits)
    added = torch.zeros(len(queries), dtype=torch.float64)
    for block in layout:
        own, inverse = visits[:, block.columns], solved[:, block.columns]
        system = rows * torch.eye(len(own), dtype=torch.float64) - own @ inverse.T
        factor, failed = torch.linalg.cholesky_ex((system + system.T) / 2)
        if failed.item():
            raise QueryError(
                f"the group carries more curvature in module {block.name!r} than the preconditioner has there, so that "
                "nothing would remain: ask with preconditioner='covariance', a larger damping, or order=1"
            )
        towards = torch.cholesky_solve((inverse @ total[block.columns])[:, None], factor)
        added += (own @ queries[:, block.columns].T).T @ towards[:, 0]
    return added
