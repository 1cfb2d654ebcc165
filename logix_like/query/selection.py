"""Which samples a question is about: by id, by what stands in a column, or by a mask."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logix_like.errors import QueryError
from logix_like.layout import DataId
from logix_like.query.scan import Candidates
from logix_like.store.reading.view import Rows

COLUMNS = ("data_id", "step", "epoch")
"""Columns that every store has; the user's own stand beside them."""

Where = Mapping[str, Any] | Sequence[DataId] | NDArray[np.bool_] | Tensor
"""Columns with the values they must have, or ids, or a mask over the rows of the view."""


def select(candidates: Candidates, where: Where | DataId | None) -> Candidates:
    """The candidates that ``where`` names; :class:`QueryError` when it names none or makes no sense."""
    if where is None:
        return candidates
    if isinstance(where, Mapping):
        return candidates.restrict(_by_columns(candidates, where), f"where={dict(where)!r}")
    where = _plain(where)
    mask = _as_mask(where, len(candidates.rows))
    if mask is not None:
        return candidates.restrict(mask, "the mask given as where")
    if isinstance(where, str | int) and not isinstance(where, bool):
        where = [where]
    if not isinstance(where, Iterable):
        raise QueryError(
            f"data_id or where is {where!r}; it must be a list of the ids (str or int) to rank, a mapping of columns "
            "to values, or a mask"
        )
    return candidates.restrict(_by_ids(candidates, list(where)), "data_id")


def _plain(where: Any) -> Any:
    """Ids in tensors and arrays as Python's own; a list of truth values as the mask it is."""
    if isinstance(where, Tensor):
        where = where.detach().cpu().numpy()
    if isinstance(where, np.ndarray | np.generic) and where.dtype != bool:
        return where.tolist()
    if isinstance(where, list | tuple) and where and all(isinstance(one, bool | np.bool_) for one in where):
        return np.array(where, dtype=bool)
    return where


def _as_mask(where: object, rows: int) -> Tensor | None:
    """``where`` as a mask, when it is one."""
    if not isinstance(where, np.ndarray) or where.dtype != bool:
        return None
    if where.shape != (rows,):
        raise QueryError(
            f"the mask given as where has the shape {where.shape}, but {rows} rows are ranked: give one truth value "
            "for each row of store.view(reduce)"
        )
    return torch.from_numpy(where.copy())


def _by_ids(candidates: Candidates, data_id: Sequence[Any]) -> Tensor:
    position_of: dict[DataId, list[int]] = {}
    ids = candidates.rows.data_id[:]
    for position in candidates.positions().tolist():
        position_of.setdefault(ids[position], []).append(position)
    wanted = torch.zeros_like(candidates.wanted)
    for one in data_id:
        if isinstance(one, bool) or not isinstance(one, Hashable) or one not in position_of:
            raise QueryError(
                f"no sample with the id {one!r} ({type(one).__name__}) can be ranked; the store has "
                f"{len(position_of)} ids, the first is {next(iter(position_of))!r}"
            )
        wanted[position_of[one]] = True
    return wanted


def _by_columns(candidates: Candidates, where: Mapping[str, Any]) -> Tensor:
    wanted = candidates.wanted.clone()
    for name, value in where.items():
        column = _column(candidates.rows, name)
        accepted = _accepted(name, value)
        fits = np.fromiter((one in accepted for one in column.tolist()), bool, len(column))
        if not (fits & candidates.wanted.numpy()).any():
            known = list(dict.fromkeys(column.tolist()[:1000]))[:5]
            raise QueryError(
                f"no sample has {name} = {value!r}; the first values of the column {name!r} are "
                f"{', '.join(map(repr, known))}"
            )
        wanted &= torch.from_numpy(fits)
    return wanted


def _accepted(name: str, value: Any) -> Collection[Any]:
    """The values that a sample may have; text is one value, not its letters."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    several = isinstance(value, Iterable) and not isinstance(value, str)
    try:
        return set(value) if several else {value}
    except TypeError as error:
        raise QueryError(
            f"where asks for {name} = {value!r}; it must be one value, or a list of values (range(a, b) for numbers)"
        ) from error


def _column(rows: Rows, name: str) -> NDArray[Any]:
    if name in COLUMNS:
        return np.asarray(getattr(rows, name))
    if name in rows.metadata:
        return np.asarray(rows.metadata[name])
    known = ", ".join([*COLUMNS, *rows.metadata])
    raise QueryError(
        f"there is no column {name!r} to choose samples by; the store has {known} (log further ones with "
        "run(data_id, metadata={name: values}))"
    )
