"""Taking rows of a store back: those behind an older checkpoint, or those of samples that are to be forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from os import PathLike

import numpy as np

from logix_like.errors import StoreError
from logix_like.layout import DataId
from logix_like.store.format.retractions import retract_ids, retract_steps
from logix_like.store.format.schema import MEAN_VIEWS, Flag
from logix_like.store.places.files import names_in
from logix_like.store.places.hold import remove_unheld
from logix_like.store.places.storage import Place
from logix_like.store.reading.means import cache_folder
from logix_like.store.reading.reader import GradientStore


def supersede_steps(path: str | PathLike[str] | Place, step: int) -> int:
    """Take back all rows so far of optimizer step ``step`` (counted from 0) and later; returns how many.

    They stay on disk and take part in nothing from here on, nor do checkpoints of later steps. Committed, and on
    the disk itself, on return.
    """
    store = GradientStore(path)
    rows = int(np.count_nonzero(_standing(store) & (store.step >= step)))
    if rows or any(checkpoint.step > step for checkpoint in store.checkpoints):
        retract_steps(store.path, step)
    return rows


def supersede_samples(path: str | PathLike[str] | Place, data_id: Collection[DataId]) -> int:
    """Take back all rows so far of some samples; returns how many.

    They stay on disk until the store is compacted; sample views and this user's indexes, which are made of them, are
    removed. What a repair took out (``quarantine/``) stays: remove that folder too where samples must be gone from
    the disk. Committed, and on the disk itself, on return.

    Raises :class:`StoreError` when a sample has no row, and then nothing is taken back.
    """
    if not data_id:
        return 0
    store = GradientStore(path)
    counts = Counter(store.data_id[_standing(store)])
    unknown = [one for one in dict.fromkeys(data_id) if not counts[one]]
    if unknown:
        raise StoreError(
            f"{len(unknown)} of the samples to be forgotten have no row in {store.path}, the first is {unknown[0]!r} "
            f"(a {type(unknown[0]).__name__}; a number and its text are two samples); nothing was taken back: give ids "
            "as they were logged"
        )
    retract_ids(store.path, data_id)
    _remove_derived(store)
    return sum(counts[one] for one in set(data_id))


def _standing(store: GradientStore) -> np.ndarray:
    mask: np.ndarray = (store.flags & int(Flag.SUPERSEDED)) == 0
    return mask


def _remove_derived(store: GradientStore) -> None:
    for parent in (store.path / MEAN_VIEWS, cache_folder(store.path, store.manifest.created), store.cache):
        for name in names_in(parent):
            if not name.startswith("."):
                remove_unheld(parent / name)
