"""The command that writes a page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import logix_like as logix
from tests.cli.calling import call, usage_error
from tests.training import SAMPLES


def test_a_report_with_contents(run: logix.Run, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "contents_of_samples.py").write_text("def text(data_id):\n    return f'words of {data_id}'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    output = tmp_path / "answer.html"
    data = ("--data", "contents_of_samples:text")
    result = call("report", run.path, "--queries", queries, "--output", output, "-k", 3, *data)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"saved to {output}\n")
    page = output.read_text(encoding="utf-8")
    for words in (
        "words of s0",
        "visits 2",
        "46 rows of 23 samples",
        "How concentrated influence is",
        "Where in the model",
    ):
        assert words in page


def test_a_report_asks_as_it_is_told(run: logix.Run, queries: Path, tmp_path: Path) -> None:
    output = tmp_path / "answer.html"
    told = ("--preconditioner", "identity", "--damping", "auto", "--mode", "cosine", "--reduce", "none")
    result = call("report", run.path, "--queries", queries, "--output", output, *told)
    assert result.exit_code == 0, result.stderr
    page = output.read_text(encoding="utf-8")
    assert "cosine, in the curvature “identity”" in page and "<span>step " in page


def test_a_report_tells_scripts_of_itself(run: logix.Run, queries: Path, tmp_path: Path) -> None:
    output = tmp_path / "answer.html"
    told = json.loads(call("report", run.path, "--queries", queries, "--output", output, "--json").stdout)
    assert told == {"file": str(output), "bytes": output.stat().st_size, "queries": 2, "samples": SAMPLES}


def test_what_is_no_function_is_said(run: logix.Run) -> None:
    assert "it must be a function" in usage_error(call("plan", "--model", "sys:path", "--samples", 1))
    assert "it must be a function" in usage_error(call("serve", run.path, "--model", "sys:path"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "is not of the form module:name"),
        ("no_such_module:x", "there is no module 'no_such_module'"),
        ("json:no_such_name", "'json' has no 'no_such_name'"),
    ],
)
def test_contents_that_are_not_there(run: logix.Run, queries: Path, name: str, message: str) -> None:
    assert message in usage_error(call("report", run.path, "--queries", queries, "--data", name))
