"""The training samples as an estimator goes over them: in one order, under names, at one or several sets of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from logix_like.curvature.passes import At, once, sets_of_weights, shuffles
from logix_like.errors import ConfigError, EmptyStoreError, QueryError
from logix_like.ids import as_data_ids
from logix_like.objective import Batch, Objective, require_objective
from logix_like.query.result import Ids

DataIds = Sequence[Any] | Callable[[Batch], Any] | None
"""One id for each sample; or what takes them from a batch; or None for running numbers."""

NO_BATCH = (
    "there are no samples to score: the loader yielded no batch (a generator is spent after one pass: give a list or a "
    "DataLoader)"
)


def require_samples(objective: Objective, queries: Batch) -> None:
    """Raise :class:`QueryError` where ``queries`` are none."""
    if not len(objective.labels(queries)):
        raise QueryError("the batch asked with holds no sample: at least one is needed")


class Samples:
    """Batches of training samples.

    Args:
        loader: Yields them, in the same order each time.
        objective: Counts the samples of a batch.
        data_id: Their names.
        at: Each call yields once for each set of weights, after loading it into the model.
        progress: Whether bars are shown.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        objective: Objective,
        *,
        data_id: DataIds = None,
        at: At = once,
        progress: bool = True,
    ) -> None:
        require_objective(objective)
        if shuffles(loader):
            raise ConfigError("the loader shuffles, so that scores would lose their samples; give one that does not")
        self._loader = loader
        self._objective = objective
        self._given = data_id
        self._at = at
        self._progress = progress
        self._ids: Ids | None = None

    @property
    def data_id(self) -> Ids:
        """``[samples]``: their names, found by going over the loader once.

        Raises:
            ConfigError: they are not one for each sample.
            EmptyStoreError: the loader yields no batch.
        """
        if self._ids is None:
            names: list[Any] = []
            count = 0
            for batch in self._loader:
                count += len(self._objective.labels(batch))
                if callable(self._given):
                    names += as_data_ids(self._given(batch))
            if not count:
                raise EmptyStoreError(NO_BATCH)
            if not callable(self._given):
                names = list(range(count) if self._given is None else as_data_ids(self._given))
            if len(names) != count:
                raise ConfigError(f"{len(names)} data ids were given for {count} samples; give one for each")
            self._ids = np.empty(count, dtype=object)
            self._ids[:] = names
        return self._ids

    def collect(self, what: str, values: Callable[[Batch], Tensor]) -> Tensor:
        """``[..., samples]``: ``values(batch) -> [..., batch]`` side by side, averaged over the sets of weights."""
        sums: list[Tensor] = []
        for number in self.weights():
            for position, batch in enumerate(self.batches(what)):
                found = values(batch).cpu()
                if number == 1:
                    sums.append(found)
                else:
                    sums[position] += found
        if not sums:
            raise EmptyStoreError(NO_BATCH)
        return torch.cat(sums, -1) / number

    def weights(self) -> Iterator[int]:
        """Numbers 1, 2, ... of the sets of weights, each while it is in the model; see :func:`sets_of_weights`."""
        return sets_of_weights(self._at)

    def batches(self, what: str) -> Iterable[Batch]:
        """All batches once, under a bar named ``what``."""
        total = len(self._loader) if isinstance(self._loader, Sized) else None
        return tqdm(self._loader, total=total, desc=what, unit="batch", disable=not self._progress)
