"""The calculator against what runs really took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import logix_like as logix
from logix_like.config import load_config
from logix_like.errors import ConfigError
from logix_like.planning import COLUMN_BYTES, plan, size
from logix_like.store import open_store
from logix_like.store.reading.table import RowTable
from tests.training import SAMPLES, data


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 3))


@pytest.mark.parametrize("settings", [{}, {"store": {"dtype": "float32"}}, {"projection": {"rank": 8}}])
def test_bytes_are_those_of_a_real_run(tmp_path: Path, settings: dict[str, object]) -> None:
    model = wide()
    x, y = data(torch.float32)
    run = logix.init("real", model, root=tmp_path, verbose=False, **settings)
    for _ in range(20):
        with run(data_id=range(SAMPLES)):
            F.cross_entropy(model(x), y).backward()
    run.finalize()
    store = run.store
    found = plan(wide(), load_config(None, **settings), samples=SAMPLES, epochs=20)
    assert (found.modules, found.numbers, found.rows) == (3, store.modules.width, len(store))
    assert found.row * len(store) == len(store) * store.gradients[:1].shape[1] * (4 if "store" in settings else 2)
    overhead = 60_000  # documents of Zarr and records, which do not grow with the rows
    assert store.bytes["rows"] + overhead - 0.9 * found.rows_on_disk >= 0
    assert store.bytes["rows"] <= 1.1 * found.rows_on_disk + overhead
    assert abs(store.bytes["statistics"] - found.statistics) <= 0.05 * found.statistics + overhead
    matrices = sum(m.numel() for pair in store.projections.values() for m in pair if m is not None)
    assert found.projections <= 4 * matrices


def test_a_model_on_the_meta_device_costs_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8192, 8192) for _ in range(4)))
    found = plan(model, load_config(), samples=1_000_000, epochs=3)
    assert (found.modules, found.numbers) == (4, 4 * 32 * 32)
    assert found.row == 2 * found.numbers
    assert found.covered == 1.0
    assert 0.002 < found.arithmetic < 0.004  # 2 x 32 of 3 x 8192
    assert found.disk < found.full / 1000
    assert "GB for 3,000,000 rows" in str(found)
    assert json.loads(json.dumps(found.to_json()))["disk"] == found.disk


def test_one_visit_needs_no_mean_rows() -> None:
    found = [plan(wide(), load_config(), samples=100, epochs=epochs).view_on_disk for epochs in (1, 2)]
    assert found[0] == 0 < found[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "int4", "sign"])
def test_mean_rows_are_those_of_a_real_view(tmp_path: Path, dtype: str) -> None:
    model, settings = wide(), {"store": {"dtype": dtype}, "statistics": ["kronecker"]}
    x, y = data(torch.float32)
    run = logix.init("real", model, root=tmp_path, verbose=False, **settings)
    for _ in range(2):
        with run(data_id=range(SAMPLES)):
            F.cross_entropy(model(x), y).backward()
    run.finalize()
    view = open_store(run.store.path).view("mean")
    found = plan(wide(), load_config(None, **settings), samples=SAMPLES, epochs=2)
    assert isinstance(view, RowTable)
    assert found.view_on_disk == SAMPLES * (view.encoding.row_bytes(view.layout) + COLUMN_BYTES)


def test_nothing_to_plan_is_refused() -> None:
    with pytest.raises(ConfigError, match="samples is 0; it must be at least 1"):
        plan(wide(), load_config(), samples=0)


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (14_336, "14.3 kB"), (3e12, "3 TB")]
)
def test_sizes_are_readable(count: float, shown: str) -> None:
    assert size(int(count)) == shown
