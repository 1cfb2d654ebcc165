"""Stores to be looked at, made once; the tests of the explorer and those with a browser import them."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.explorer import stores


@pytest.fixture(scope="package")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    return stores.text_store(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="package")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    pytest.importorskip("sklearn")
    return stores.picture_store(tmp_path_factory.mktemp("pictures"))
