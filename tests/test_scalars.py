"""Numbers for the loggers of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import logix_like as logix
from logix_like.scalars import ScalarLog


def test_rows_and_norms_are_told(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with logix.init("told", model, root=tmp_path, verbose=False) as run:
        log = ScalarLog(run, "x/")
        assert log.read() == {"x/rows": 0.0, "x/rows_per_second": 0.0}
        for start in (0, 10):
            with run(data_id=range(start, start + 10)):
                model(torch.randn(10, 3)).square().sum().backward()
        run.commit()
        told = log.read()
        assert told["x/rows"] == 20 and told["x/rows_per_second"] > 0
        norms = run.get_log().gradients.norm(dim=1)
        assert told["x/gradient_norm_p50"] == pytest.approx(float(norms.quantile(0.5)))
        assert told["x/gradient_norm_p05"] <= told["x/gradient_norm_p50"] <= told["x/gradient_norm_p95"]
        assert log.read()["x/rows_per_second"] == 0


def test_rows_that_are_not_finite_have_no_norm(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with logix.init("nan", model, root=tmp_path, verbose=False) as run:
        with run(data_id=[0, 1]):
            model(torch.full((2, 3), float("nan"))).sum().backward()
        assert set(ScalarLog(run).read()) == {"logix_like/rows", "logix_like/rows_per_second"}
