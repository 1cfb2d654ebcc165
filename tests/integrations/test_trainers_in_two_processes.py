"""Both trainers in two processes (gloo, CPU): their store is the one that a single process writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")

import logix_like as logix
from tests.integrations.ranks_trainers_script import SAMPLES, TRAINERS

ROOT = Path(__file__).parents[2]
REORDERED = 1e-5
"""Gradients in float32, summed in another order."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::Warning:lightning.*", "ignore:.*LeafSpec.*"),
]


def in_two_processes(name: str, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(ROOT / "tests" / "integrations" / "ranks_trainers_script.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, script, str(root), name], env=environment, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.parametrize("name", TRAINERS)
def test_the_merged_store_is_that_of_one_process(tmp_path: Path, name: str) -> None:
    ended = in_two_processes(name, tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    found = logix.open_store(tmp_path / "two" / "run")
    expected = TRAINERS[name](tmp_path / "one", 1).store
    assert [(writer.rank, writer.rows, writer.state) for writer in found.writers] == [
        (0, SAMPLES, "closed"),
        (1, SAMPLES, "closed"),
    ]
    order, reference = (np.lexsort((store.data_id.astype(int), store.epoch)) for store in (found, expected))
    for column in ("data_id", "step", "epoch", "lr"):
        assert list(getattr(found, column)[order]) == list(getattr(expected, column)[reference]), column
    rows, wanted = found.gradients[order], expected.gradients[reference]
    assert float(((rows - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) < REORDERED
    assert found.statistics.rows == expected.statistics.rows == 2 * SAMPLES
    for block in found.modules:
        ours, theirs = (store.statistics.covariance(block.name) for store in (found, expected))
        assert float((ours - theirs).norm() / theirs.norm()) < REORDERED


def test_a_process_of_lightning_that_raises_waits_for_no_other(tmp_path: Path) -> None:
    ended = in_two_processes("broken", tmp_path)
    assert ended.returncode != 0
    assert "RuntimeError: broken" in ended.stderr
    assert len(logix.open_store(tmp_path / "run")) >= 4
