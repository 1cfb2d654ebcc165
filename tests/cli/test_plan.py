"""The command that calculates."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.calling import call, usage_error


def test_a_plan_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "from torch import nn", "def build():", "    return nn.Linear(1000, 1000)", "def wrong():", "    return 3"
    (tmp_path / "model_to_plan.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ("--samples", 1000, "--epochs", 2)
    told = json.loads(call("plan", "--model", "model_to_plan:build", *arguments, "--json").stdout)
    assert (told["modules"], told["numbers"], told["rows"], told["row"]) == (1, 1024, 2000, 2048)
    assert "for 2,000 rows" in call("plan", "--model", "model_to_plan:build", *arguments).stdout
    assert "returned a int; it must return the model" in usage_error(
        call("plan", "--model", "model_to_plan:wrong", *arguments)
    )
