"""What tests of stores share: one S3 server, a bound on memory."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.s3_server import s3_server


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """The environment that leads to a real S3 server with an empty bucket."""
    with s3_server() as environment:
        yield environment


@pytest.fixture
def one_gibibyte() -> Iterator[None]:
    """No allocation goes more than 1 GiB beyond what the process has: it would be a MemoryError, no named one."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
