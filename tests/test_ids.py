"""What samples may be called."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from logix_like.errors import CaptureError
from logix_like.ids import as_data_ids


@pytest.mark.parametrize(
    "given",
    [[3, 1], range(3, -1, -2), torch.tensor([3, 1]), torch.tensor([[3], [1]]), np.array([[3], [1]]), np.array([3, 1])],
    ids=lambda given: type(given).__name__,
)
def test_whole_numbers_are_ids_themselves(given: Any) -> None:
    ids = as_data_ids(given)
    assert ids == (3, 1)
    assert all(type(one) is int for one in ids)


def test_token_ids_are_hashed_without_padding() -> None:
    tokens = torch.tensor([[5, 6, 0], [5, 6, 7]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ids = as_data_ids(tokens, mask)
    assert ids[0] == as_data_ids(tokens[:1, :2])[0] != ids[1]
    assert all(len(str(one)) == 32 for one in ids)


@pytest.mark.parametrize(
    "given", ["name", 3, torch.tensor([0.5, 1.5]), torch.ones(2, 2, 2).long(), [True], [1.5]], ids=repr
)
def test_what_is_no_name_is_refused(given: Any) -> None:
    with pytest.raises(CaptureError, match=r"give|ids are str or int"):
        as_data_ids(given)
