"""What tests of stores share: one S3 server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.store.s3_server import s3_server


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """The environment that leads to a real S3 server with an empty bucket."""
    with s3_server() as environment:
        yield environment
