"""Going over a data loader without training: running ids and a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from logix_like.errors import ConfigError


def batch_ids(batch: Any, first: int) -> range:
    """Running numbers for the samples of ``batch``, from ``first``; its size is its first tensor's."""
    return range(first, first + batch_size(batch))


def batch_size(batch: Any) -> int:
    """Length of the first tensor found in ``batch``."""
    # Mappings of other libraries (a tokenizer's batch) are no containers that torch knows.
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    tensor = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)
    if tensor is None:
        raise ConfigError("the batch holds no tensor to count samples by; give data_id=")
    return len(tensor)


def progress_over(loader: Iterable[Any], shown: bool, name: str, *, running_ids: bool) -> Iterator[tuple[int, Any]]:
    """Batches with the number of samples before them; a bar counts the samples.

    ``running_ids`` says that samples are named by running numbers, which a shuffling loader would misplace.
    """
    if running_ids and isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
        raise ConfigError(
            "the loader shuffles, so running numbers name no sample; give data_id=lambda batch: ..., or do not shuffle"
        )
    total = len(loader) if isinstance(loader, Sized) else None
    seen = 0
    with tqdm(total=total, desc=f"extract {name}", unit="batch", disable=not shown) as bar:
        for batch in loader:
            yield seen, batch
            seen += _size_or_zero(batch)
            bar.update()


def _size_or_zero(batch: Any) -> int:
    try:
        return batch_size(batch)
    except ConfigError:
        return 0
