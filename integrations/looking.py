"""Loaders for looking at a trainer's samples without training on them."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from logix_like.errors import CaptureError


def in_order(loader: Any) -> DataLoader[Any]:
    """A loader over the same samples as a trainer's, in the dataset's order.

    Raises:
        CaptureError: the dataset has no order.
    """
    loader = getattr(loader, "base_dataloader", loader)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise CaptureError(
            "sensitivities need a dataset with an index, so that a sample has the same number at each look; this "
            f"trainer's loader is a {type(loader).__name__} over a {type(getattr(loader, 'dataset', None)).__name__}"
        )
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    return DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn, shuffle=False)
