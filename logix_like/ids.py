"""What users call their samples: strings, whole numbers, or token sequences that are hashed."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logix_like.errors import CaptureError
from logix_like.layout import DataId


def as_data_ids(ids: Any, mask: Tensor | None = None) -> tuple[DataId, ...]:
    """One id for each sample, from a list, a tensor or array of integers ``[batch]`` or ``[batch, 1]``, or token ids.

    Each row of token ids ``[batch, positions]`` is hashed (BLAKE2b-128, hex) without the positions that ``mask
    [batch, positions]`` leaves out, so that padding does not change a sequence's id.

    Raises:
        CaptureError: an id is neither ``str`` nor ``int``, or the shape makes no sense.
    """
    if isinstance(ids, np.ndarray):
        ids = torch.from_numpy(ids.astype(np.int64)) if ids.dtype.kind in "iu" else ids.tolist()
    if isinstance(ids, Tensor):
        return _from_tensor(ids, mask)
    if isinstance(ids, str | int) or not isinstance(ids, Iterable):
        raise CaptureError(f"data_id is {reprlib.repr(ids)}; give a sequence with one id (str or int) for each sample")
    return tuple(_single(value) for value in ids)


def as_stored_ids(ids: Any) -> tuple[DataId, ...]:
    """The same for samples that were logged, of which one may be named by its id alone."""
    return as_data_ids([ids] if isinstance(ids, str | int | np.integer) else ids)


def _from_tensor(ids: Tensor, mask: Tensor | None) -> tuple[DataId, ...]:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim not in (1, 2):
        raise CaptureError(
            f"data_id is a tensor of {ids.dtype} with shape {tuple(ids.shape)}; give whole numbers [batch], "
            "or token ids [batch, positions] to be hashed"
        )
    if ids.ndim == 1 or ids.shape[1] == 1:
        return tuple(ids.flatten().tolist())
    if mask is not None and mask.shape != ids.shape:
        raise CaptureError(f"mask has shape {tuple(mask.shape)}, the token ids {tuple(ids.shape)}")
    keep = None if mask is None else mask.bool().cpu().numpy()
    rows = ids.cpu().numpy().astype("<i8")
    return tuple(_hash(row if keep is None else row[keep[i]]) for i, row in enumerate(rows))


def _hash(tokens: np.ndarray) -> str:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest()


def _single(value: Any) -> DataId:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        raise CaptureError(f"the data id {value!r} is a bool; ids are str or int")
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point():
        return int(value)
    raise CaptureError(f"the data id {value!r} is a {type(value).__name__}; ids are str or int")
