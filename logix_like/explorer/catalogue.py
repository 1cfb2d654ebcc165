"""The samples of a store as a list that can be searched, filtered and sorted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logix_like.layout import DataId
from logix_like.store import Rows

Numbers = NDArray[np.int64]
SELF_INFLUENCE = "self-influence"
SORTS = (SELF_INFLUENCE, "gradient norm", "loss", "visits", "step", "order")
"""By what samples can be sorted; ``order`` is the store's own."""
CHOICES = 40
"""A column with more different values than this is no class to filter by."""


@dataclass(frozen=True)
class Wish:
    """What part of the samples somebody wants to see."""

    text: str = ""
    """Part of an id."""
    where: Mapping[str, str] = field(default_factory=dict)
    """By column the value that is wanted, as text."""
    first_step: int | None = None
    last_step: int | None = None
    sort: str = "order"
    """One of :data:`SORTS`."""
    ascending: bool = False

    @property
    def restricts(self) -> bool:
        """Whether some samples are left out."""
        return bool(self.text or self.where or self.first_step is not None or self.last_step is not None)


class Catalogue:
    """Samples with their columns; each is read at its first use.

    Args:
        rows: One row for each sample.
        complete: Whether these are all samples of the store.
    """

    def __init__(self, rows: Rows, *, complete: bool = True) -> None:
        self.rows = rows
        self.complete = complete
        self.self_influence: NDArray[np.float64] | None = None
        """``[samples]``, once it has been computed."""
        self._orders: dict[str, Numbers] = {}
        self._texts_of: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def ids(self) -> list[DataId]:
        """Ids in the store's order."""
        listed: list[DataId] = self.rows.data_id.tolist()
        return listed

    @cached_property
    def metadata(self) -> Mapping[str, NDArray[np.object_]]:
        """The user's columns."""
        return dict(self.rows.metadata)

    @cached_property
    def numbers(self) -> Mapping[str, NDArray[np.float64]]:
        """Columns of numbers by the name of their order; NaN where a value is not known."""
        rows = self.rows
        steps = np.where(rows.step < 0, np.nan, rows.step)
        return {"gradient norm": rows.norm, "loss": rows.loss, "visits": rows.visits.astype(np.float64), "step": steps}

    @cached_property
    def _texts(self) -> list[str]:
        return [str(data_id).casefold() for data_id in self.ids]

    @cached_property
    def _places(self) -> dict[DataId, int]:
        return {data_id: place for place, data_id in enumerate(self.ids)}

    def place(self, data_id: DataId) -> int | None:
        """Where a sample stands, or None."""
        return self._places.get(data_id)

    @cached_property
    def choices(self) -> dict[str, list[str]]:
        """By column of few different values these values, the most frequent first."""
        return {name: values for name in self.metadata if (values := self._values(name))}

    def _values(self, name: str) -> list[str]:
        counted = Counter(self._column(name))
        return [value for value, _ in counted.most_common()] if len(counted) <= CHOICES else []

    def _column(self, name: str) -> list[str]:
        if name not in self._texts_of:
            self._texts_of[name] = [str(value) for value in self.metadata[name].tolist()]
        return self._texts_of[name]

    @property
    def has_steps(self) -> bool:
        """Whether rows know their step."""
        return bool(np.isfinite(self.numbers["step"]).any())

    def take_self_influence(self, ids: list[DataId], scores: NDArray[np.float64]) -> None:
        """Keep the self-influences of the samples called ``ids``."""
        found = np.full(len(self), np.nan)
        for data_id, score in zip(ids, scores.tolist(), strict=True):
            place = self._places.get(data_id)
            if place is not None:
                found[place] = score
        self.self_influence = found
        self._orders.pop(SELF_INFLUENCE, None)

    def chosen(self, wish: Wish) -> Numbers:
        """Places of the samples that are wanted, in the wanted order."""
        order = self._order(wish.sort)
        if wish.ascending:
            order = order[::-1]
        return order[self._mask(wish)[order]] if wish.restricts else order

    def _mask(self, wish: Wish) -> NDArray[np.bool_]:
        mask = np.ones(len(self), dtype=bool)
        if wish.text:
            wanted = wish.text.casefold()
            mask &= np.fromiter((wanted in text for text in self._texts), bool, len(self))
        for name, value in wish.where.items():
            if name in self.metadata:
                mask &= np.fromiter((one == value for one in self._column(name)), bool, len(self))
        if wish.first_step is not None:
            mask &= self.numbers["step"] >= wish.first_step
        if wish.last_step is not None:
            mask &= self.numbers["step"] <= wish.last_step
        return mask

    def _order(self, sort: str) -> Numbers:
        """All places, the highest value first; what is unknown comes last."""
        if sort not in self._orders:
            values = self._sorted_by(sort)
            if values is None:
                return np.arange(len(self))
            self._orders[sort] = np.argsort(np.where(np.isnan(values), -np.inf, values), kind="stable")[::-1]
        return self._orders[sort]

    def _sorted_by(self, sort: str) -> NDArray[np.float64] | None:
        return self.self_influence if sort == SELF_INFLUENCE else self.numbers.get(sort)

    def facts(self, place: int) -> dict[str, Any]:
        """What is known of one sample: the user's columns, then numbers."""
        known: dict[str, Any] = {name: column[place] for name, column in self.metadata.items()}
        numbers = {name: float(column[place]) for name, column in self.numbers.items()}
        whole = ("visits", "step")
        return known | {
            name: int(value) if name in whole else value for name, value in numbers.items() if not np.isnan(value)
        }

    def of(self, data_id: DataId) -> dict[str, Any]:
        """The same by a sample's id; nothing for one that is not there."""
        place = self.place(data_id)
        return {} if place is None else self.facts(place)
