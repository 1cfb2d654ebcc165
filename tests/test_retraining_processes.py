"""The oracle among real processes that are really killed; each test trains in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from logix_like.errors import RetrainingError
from logix_like.retraining import Measurements, SubsetOracle
from logix_like.subsets import without_each

N = 30
DEADLY = sum(range(N)) - 20
"""Sum of the subset without sample 20, whose training kills its process where :data:`DEATH` is set."""
LOG, DEATH = "RETRAINING_TEST_LOG", "RETRAINING_TEST_DEATH"


def train(samples: list[int], seed: int) -> Tensor:
    """Writes down that it was called, and takes a while."""
    with Path(os.environ[LOG]).open("a") as log:
        log.write(f"{sum(samples)}\n")
    time.sleep(0.05)
    if DEATH in os.environ and sum(samples) == DEADLY:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.tensor([float(sum(samples))])


def itself(model: Tensor) -> Tensor:
    return model


def measured(cache: Path, executor: object = None) -> Measurements:
    """All subsets that lack one sample, each the sum of its samples."""
    return SubsetOracle(train, itself, N, cache=cache, executor=executor).measurements(without_each(N))


def require_right(found: Measurements) -> None:
    assert not found.failures
    assert found.values[:, 0, 0].tolist() == [sum(range(N)) - i for i in range(N)]


def started(cache: Path) -> subprocess.Popen[bytes]:
    command = f"from pathlib import Path; from {__name__} import measured; measured(Path({str(cache)!r}))"
    return subprocess.Popen([sys.executable, "-c", command], cwd=Path(__file__).parents[1])


def trained(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.mark.slow
def test_a_killed_process_is_gone_on_with_by_two_at_once(tmp_path: Path, log: Path) -> None:
    cache = tmp_path / "cache"
    first = started(cache)
    while len(trained(log)) < 8:
        time.sleep(0.01)
    first.kill()
    first.wait()
    done = {path.name for path in cache.glob("*-0.json")}
    known = len(trained(log))
    assert len(done) >= known - 1
    both = [started(cache) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    again = trained(log)[known:]
    assert len(set(again)) == N - len(done)  # what was kept, neither trained again
    require_right(measured(cache))
    assert len(trained(log)) == known + len(again)


@pytest.mark.slow
def test_a_pool_whose_worker_is_killed_is_said_and_another_goes_on(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as deadly, pytest.raises(RetrainingError, match="a worker process died"):
        deadly.setenv(DEATH, "1")
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            measured(tmp_path / "cache", pool)
    done = len(list((tmp_path / "cache").glob("*-0.json")))
    known = len(trained(log))
    assert done >= known - 3  # the killed one, the one beside it, and one on its way
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        require_right(measured(tmp_path / "cache", pool))
    assert len(trained(log)) - known == N - done


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a cluster whose workers are killed
def test_a_dask_cluster_whose_worker_is_killed_names_the_retraining_and_does_the_rest(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dask = pytest.importorskip("dask")
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv(DEATH, "1")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = measured(tmp_path / "cache", client)
    assert any("KilledWorker" in failure.reason for failure in found.failures)
    failed = found.values[:, 0, 0].isnan()
    assert failed[20] and int(failed.sum()) <= 3  # with it what was queued on the same worker
    monkeypatch.delenv(DEATH)
    require_right(measured(tmp_path / "cache"))
