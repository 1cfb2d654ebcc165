"""What a query reads of a store: the face that stores and their sample views share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from logix_like.layout import Layout
from logix_like.statistics import Statistics


class Column(Protocol):
    """One value for each row, read by slice or by an array of positions."""

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """Give the values at ``key``."""


class Gradients(Protocol):
    """Decoded rows, read by slice or by an array of positions."""

    def __getitem__(self, key: Any) -> Tensor:
        """Give ``[n, width]``, float32 or float64."""


class Chunk(Protocol):
    """Some adjoining rows as they lie on disk."""

    @property
    def start(self) -> int:
        """Position of the first row."""

    @property
    def raw(self) -> Tensor:
        """The encoded rows, one after another along the first dimension."""

    def decode(self) -> Tensor:
        """Give ``[n, width]``, float32 or float64."""


class Rows(Protocol):
    """Rows in an order of their own: every visit of a store, or one row for each sample."""

    def __len__(self) -> int:
        """Count the rows, valid or not."""

    @property
    def layout(self) -> Layout:
        """The module table of the columns."""

    @property
    def key(self) -> str:
        """Identifies the rows: other rows have another key."""

    @property
    def valid(self) -> NDArray[Any]:
        """``[rows]`` bool: which rows are finite and not superseded."""

    @property
    def factor(self) -> NDArray[Any] | None:
        """``[rows]``: what each row is to be multiplied by, None for 1."""

    @property
    def data_id(self) -> Column:
        """Ids, ``str`` or ``int``."""

    @property
    def step(self) -> Column:
        """Steps at which the rows were logged."""

    @property
    def gradients(self) -> Gradients:
        """The rows' numbers."""

    def chunks(self) -> Iterator[Chunk]:
        """Yield all rows in order, a bounded piece at a time."""


class GatheredRows(Rows, Protocol):
    """All visits of a store, with the statistics gathered over them."""

    @property
    def statistics(self) -> Statistics:
        """Sums over the rows, as far as they were gathered."""

    def view(self, reduce: str) -> Rows:
        """Give each sample's ``mean``, ``sum`` or ``last`` visit, or every visit by itself (``none``)."""
