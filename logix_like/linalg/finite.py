"""Refusing sums that overflowed, before a factorisation fails on them in words of its own."""

from __future__ import annotations

from torch import Tensor

from logix_like.errors import StatisticsError


def require_finite(values: Tensor, name: str) -> None:
    """Raise :class:`StatisticsError` naming the module ``name`` unless all of ``values`` are finite."""
    if not bool(values.isfinite().all()):
        raise StatisticsError(
            f"the statistics of module {name!r} hold numbers that are not finite: some of its gradients are so large "
            "that their products overflow (store.norm tells which rows); leave such samples out of the log, or ask "
            "with preconditioner='identity'"
        )
