"""The explorer's tests."""

from __future__ import annotations

import pytest
import torch

from tests.explorer.fixtures import pictures, texts

__all__ = ["pictures", "texts"]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
