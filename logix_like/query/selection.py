"""Which samples a question is about: by id, by what stands in a column, or by a mask."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral
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
        shown = ", ".join(f"{name!r}: {reprlib.repr(value)}" for name, value in where.items())
        return candidates.restrict(_by_columns(candidates, where), f"where={{{shown}}}")
    where = _plain(where)
    mask = _as_mask(where, len(candidates.rows))
    if mask is not None:
        return candidates.restrict(mask, "the mask given as where")
    if isinstance(where, str | int) and not isinstance(where, bool):
        where = [where]
    if not isinstance(where, Iterable):
        raise QueryError(
            f"data_id or where is {reprlib.repr(where)}; it must be a list of the ids (str or int) to rank, a mapping "
            "of columns to values, or a mask"
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
    column, rankable = candidates.rows.data_id[:], candidates.wanted.numpy()
    asked = {one for one in data_id if _is_id(one)}
    fits = np.fromiter((one in asked for one in column.tolist()), bool, len(column)) & rankable
    found = set(column[fits].tolist())
    unknown = [one for one in data_id if not _is_id(one) or one not in found]
    if unknown:
        known = dict.fromkeys(column[rankable].tolist())
        raise QueryError(
            f"no sample with the id {unknown[0]!r} ({type(unknown[0]).__name__}) can be ranked; "
            f"{'the store has' if candidates.complete else 'the filter leaves'} {len(known)} ids, the first is "
            f"{next(iter(known))!r}"
        )
    return torch.from_numpy(fits)


def _is_id(one: object) -> bool:
    return isinstance(one, str | Integral) and not isinstance(one, bool)


def _by_columns(candidates: Candidates, where: Mapping[str, Any]) -> Tensor:
    wanted = candidates.wanted.clone()
    for name, value in where.items():
        column = _column(candidates.rows, name)
        accepted = _accepted(name, value)
        fits = np.fromiter((one in accepted for one in column.tolist()), bool, len(column))
        if not (fits & candidates.wanted.numpy()).any():
            known = list(dict.fromkeys(column.tolist()[:1000]))[:5]
            raise QueryError(
                f"no sample has {name} = {reprlib.repr(value)}; the first values of the column {name!r} are "
                f"{', '.join(map(repr, known))}"
            )
        wanted &= torch.from_numpy(fits)
    return wanted


def _accepted(name: str, value: Any) -> Collection[Any]:
    """The values that a sample may have; text is one value, not its letters."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if not all(isinstance(one, str | int | float | np.generic | None) for one in values):
        raise QueryError(
            f"where asks for {name} = {reprlib.repr(value)}; it must be one value, or a list of values (range(a, b) "
            "for numbers)"
        )
    return set(values)


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
