"""What is asked with: gradients of queries, in the coordinates of a store's rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from logix_like.errors import QueryError
from logix_like.layout import DataId, Layout
from logix_like.preconditioner import FittedPreconditioner


@dataclass(frozen=True, eq=False)
class QueryGradients:
    """Gradients of some queries' losses, projected as the store's rows are."""

    data_id: tuple[DataId, ...]
    """One id for each query."""
    gradients: Tensor
    """``[queries, width]``."""
    layout: Layout
    """The module table of the columns."""
    note: str = ""
    """How they were made, for the result's note, e.g. ``mean over 3 checkpoints``."""
    projections: str = ""
    """Digest of the projections they were made with, as a store's ``projections_digest``; empty: not known."""

    def __post_init__(self) -> None:
        """Refuse gradients that are no tensor, or whose shape does not fit the ids and the layout."""
        if not isinstance(self.gradients, Tensor):
            raise QueryError(
                f"query gradients are a {type(self.gradients).__name__}; they must be a tensor [queries, "
                f"{self.layout.width}] (torch.as_tensor makes one)"
            )
        expected = (len(self.data_id), self.layout.width)
        if tuple(self.gradients.shape) != expected:
            raise QueryError(
                f"query gradients have the shape {tuple(self.gradients.shape)}; {expected[0]} ids and "
                f"rows of {expected[1]} numbers need {expected}"
            )

    def __len__(self) -> int:
        """Count the queries."""
        return len(self.data_id)

    def require_answerable(self) -> None:
        """Raise :class:`QueryError` when there is no query or a gradient is not finite."""
        if not self.data_id:
            raise QueryError("there is no query: at least one gradient is needed to ask with")
        self._require_finite(self.gradients, "gradient", "check the query's loss, or leave it out")

    def preconditioned(self, preconditioner: FittedPreconditioner, dtype: torch.dtype | None = None) -> Tensor:
        """``(F + lambda I)^-1 g`` of each, ``[queries, width]``, on the CPU; in ``dtype`` where one is given.

        Raises :class:`QueryError` where that is more than the numbers can hold.
        """
        found = preconditioner.apply(self.gradients.detach().to("cpu", dtype))
        advice = "the query is too large for that: divide its loss by a constant, or ask with a larger damping"
        self._require_finite(found, "preconditioned gradient", advice)
        return found

    def _require_finite(self, rows: Tensor, what: str, advice: str) -> None:
        if math.isfinite(rows.sum().item()):  # the usual case, in one pass
            return
        finite = torch.isfinite(rows).all(dim=1)
        if not bool(finite.all()):
            first = self.data_id[int(finite.to(torch.uint8).argmin())]
            raise QueryError(
                f"the {what} of query {first!r} ({int((~finite).sum())} of {len(self)} queries) holds NaN or infinite "
                f"numbers; {advice}"
            )

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the gradients with their ids and module table to a ``.npz`` file; returns its path.

        Whole or not at all; nothing is pickled. ``logix-like query`` reads it.
        """
        from logix_like.query.files import write_queries

        return write_queries(self, Path(path))

    @classmethod
    def load(cls, path: str | PathLike[str], layout: Layout | None = None) -> QueryGradients:
        """Read what :meth:`save` wrote, or a file made elsewhere that holds ``data_id`` and ``gradients``.

        Args:
            path: The ``.npz`` file.
            layout: The module table for a file without one, e.g. ``store.modules``; of such a file only the
                width can be checked.

        Raises:
            QueryError: the file is missing, damaged or something else, or its width is not the layout's.
        """
        from logix_like.query.files import read_queries

        return read_queries(Path(path), layout)
