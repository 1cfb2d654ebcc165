"""A query as it is being captured: filled by one block, or averaged over several checkpoints."""

from __future__ import annotations

from torch import Tensor

from logix_like.errors import QueryError
from logix_like.layout import DataId, Layout
from logix_like.query.gradients import QueryGradients


class Query:
    """What ``with run.query(...) as query`` yields; :attr:`gradients` is there once the block has ended."""

    def __init__(self, data_id: tuple[DataId, ...]) -> None:
        self.data_id = data_id
        self._sum: Tensor | None = None
        self._layout: Layout | None = None
        self._count = 0

    def add(self, rows: Tensor, layout: Layout) -> None:
        """Take one block's rows ``[queries, width]``."""
        self._sum = rows if self._sum is None else self._sum + rows
        self._layout = layout
        self._count += 1

    @property
    def gradients(self) -> QueryGradients:
        """Mean over the captured blocks.

        Raises:
            QueryError: the block has not ended, or ended with an exception.
        """
        if self._sum is None or self._layout is None:
            raise QueryError("the query holds no gradient: run forward and backward inside 'with run.query(...)'")
        note = "" if self._count == 1 else f"query gradient averaged over {self._count} checkpoints"
        return QueryGradients(self.data_id, self._sum / self._count, self._layout, note)

    def __len__(self) -> int:
        return len(self.data_id)
