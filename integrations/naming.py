"""What the samples of a batch are called in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from logix_like.errors import CaptureError, ConfigError
from logix_like.ids import as_data_ids
from logix_like.layout import DataId

from .order import LoaderOrder

NamedBy = str | Sequence[Any] | Callable[[Any], Any] | None
"""``None``: the dataset index, or a hash of the content where there is none; text: a column of the dataset; a
sequence: the name of each dataset index; a function: takes a batch, gives one id for each of its samples."""


class SampleNames:
    """Ids of the batches that one loader hands out, in their order.

    Args:
        named_by: see :data:`NamedBy`.
        loader: the training loader.
        dataset: holds the column, where the trainer removed it from the loader's dataset.

    Raises:
        ConfigError: the column is not there, or holds something else than one id for each sample.
        CaptureError: the loader's order cannot be watched.
    """

    def __init__(self, named_by: NamedBy, loader: Any, dataset: Any = None) -> None:
        self._function: Callable[[Any], Any] | None = named_by if callable(named_by) else None
        self._loader = loader
        self.order: LoaderOrder | None = None
        """The loader's order, where ids come from dataset indices."""
        self._names: Sequence[DataId] | None = None
        by_index = LoaderOrder.fits(loader)
        if named_by is not None and not callable(named_by):
            if not by_index:
                raise ConfigError(
                    f"the training data has no indices ({_why(loader)}), so that neither a column nor a sequence can "
                    "name its samples; give data_id= a function of the batch"
                )
            named = _column(named_by, dataset, loader) if isinstance(named_by, str) else named_by
            self._names = _checked(named, loader)
        if self._function is None and by_index:
            self.order = LoaderOrder(loader)

    def take(self, batch: Any, mask: Tensor | None, iterator: Any = None) -> tuple[DataId, ...]:
        """Ids of ``batch``, which is the next one of the loader, or of this ``iterator`` of it where that is known."""
        if self._function is not None:
            return as_data_ids(self._function(batch), mask)
        if self.order is None:
            return _content(batch, mask, self._loader)
        indices = self.order.take(iterator)
        if self._names is None:
            return indices
        return tuple(self._names[index] for index in indices)

    def pass_over(self, iterator: Any = None) -> None:
        """The next batch of the loader, or of this ``iterator`` of it, is not trained on."""
        if self.order is not None:
            self.order.take(iterator)

    def close(self) -> None:
        """Leave the loader as it was."""
        if self.order is not None:
            self.order.close()


def _column(name: str, dataset: Any, loader: Any) -> Sequence[Any]:
    source: Any
    for source in (dataset, getattr(loader, "dataset", None)):
        if name in (getattr(source, "column_names", None) or ()):
            return _values(source[name])
        if isinstance(source, list | tuple) and source and isinstance(source[0], Mapping) and name in source[0]:
            return [sample[name] for sample in source]
    known = getattr(getattr(loader, "dataset", None), "column_names", None)
    raise ConfigError(
        f"data_id={name!r} names no column of the training data"
        + (f" (its columns are {', '.join(known)})" if known else "")
        + "; if the trainer removes unused columns, give the dataset too: LogixCallback(data_id=..., dataset=...); "
        "or give data_id= the names themselves, in the dataset's order"
    )


def _checked(names: Any, loader: Any) -> Sequence[DataId]:
    """One id for each sample, said before a long training begins if they are not."""
    if isinstance(names, Mapping) or not isinstance(names, Iterable):
        raise ConfigError(
            f"data_id is a {type(names).__name__}; give a column's name, the samples' names in the dataset's order, or "
            "a function of the batch"
        )
    try:
        ids = as_data_ids(names if isinstance(names, Tensor | np.ndarray) else list(names))
    except CaptureError as error:
        raise ConfigError(f"data_id= cannot name the samples: {error}") from error
    samples = len(getattr(loader, "base_dataloader", loader).dataset)
    if len(ids) != samples:
        raise ConfigError(
            f"data_id= holds {len(ids)} names, and the training data {samples} samples; give the name of each sample, "
            "in the dataset's order"
        )
    return ids


def _values(column: Any) -> Sequence[Any]:
    values: Sequence[Any] = list(column)
    return values


def _why(loader: Any) -> str:
    """Why a loader's samples have no indices."""
    loader = getattr(loader, "base_dataloader", loader)
    if not isinstance(loader, DataLoader):
        return f"it comes from a {type(loader).__name__}, not from one DataLoader"
    return "an iterable dataset" if isinstance(loader.dataset, IterableDataset) else "its loader forms no batches"


def _content(batch: Any, mask: Tensor | None, loader: Any) -> tuple[DataId, ...]:
    """Hashes of the token ids of each sample."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise CaptureError(
            f"the training data has no indices ({_why(loader)}) and the batch no 'input_ids' [batch, positions] to "
            "name its samples by; give LogixCallback(data_id=...), a function of the batch"
        )
    return as_data_ids(tokens, mask if mask is not None and mask.shape == tokens.shape else None)
