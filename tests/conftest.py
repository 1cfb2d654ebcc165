"""What holds for every test: one thread, a seed of its own, caches of its own, and nothing left behind."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Threads that other libraries start once and keep: zarr's event loop and its pool, tqdm's monitor, starlette's
# workers, and the stand-ins for threads that Python did not start.
KEPT_BY_OTHERS = ("zarr_", "asyncio_", "Dummy-", "Thread-tqdm", "AnyIO worker", "Dask-Offload")
GRACE_SECONDS = 2.0


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """On two busy cores a second thread makes the steps of tiny models slower, not faster."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_random_state() -> Iterator[None]:
    """Each test starts from seed 0 and leaves torch's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread running or one of torch's settings changed."""
    threads, settings = set(threading.enumerate()), _settings()
    yield
    left = [thread.name for thread in _started_since(threads)]
    found = _settings()
    # Put back first, so that the tests behind this one do not fail with it.
    torch.set_default_dtype(settings[0])
    torch.set_num_threads(settings[1])
    torch.set_grad_enabled(settings[2])
    if found[3] != settings[3]:
        torch.compiler.set_stance(settings[3])
    assert not left, f"the test left threads running: {left}; close what it opened"
    assert found == settings, "the test changed torch's default dtype, thread count, grad mode or way of compiling"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, an empty one for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LOGIX_LIKE_CACHE", str(folder))
    return folder


def _settings() -> tuple[torch.dtype, int, bool, str]:
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    stance = "default" if compiler is None else compiler._stance.stance
    return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), stance


def _started_since(before: set[threading.Thread]) -> list[threading.Thread]:
    """Threads that still run after a moment's grace."""
    deadline = time.monotonic() + GRACE_SECONDS
    while left := [t for t in threading.enumerate() if t not in before and not _is_kept(t)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.01)
    return left


def _is_kept(thread: threading.Thread) -> bool:
    return thread.name.startswith(KEPT_BY_OTHERS) or type(thread).__module__.startswith("tqdm")
