"""The command that writes a page."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import logix_like as logix
from tests.cli.calling import call, refused, usage_error
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


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module in the present folder and tells its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str) -> str:
        name = f"mine_{secrets.token_hex(4)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


@pytest.mark.parametrize(
    ("source", "message"),
    [("1 / 0\n", "ZeroDivisionError: division by zero (line 1 of "), ("def f(:\n", "SyntaxError: invalid syntax (")],
)
def test_a_module_that_fails_is_one_line(
    run: logix.Run, queries: Path, mine: Callable[[str], str], source: str, message: str
) -> None:
    name = mine(source)
    line = refused(call("report", run.path, "--queries", queries, "--data", f"{name}:text_of"))
    assert f"{name!r} failed when it was imported: {message}" in line and f"{name}.py" in line


def test_a_function_that_fails_is_one_line(run: logix.Run, mine: Callable[[str], str]) -> None:
    name = mine("def build():\n    raise RuntimeError('no\\nweights')\n")
    for command in (("plan", "--samples", 1), ("serve", run.path)):
        line = refused(call(*command, "--model", f"{name}:build"))
        assert f"{name}:build() failed: RuntimeError: no weights (line 2 of " in line


def test_a_folder_that_is_not_there_is_said_before_anything_is_computed(
    run: logix.Run, queries: Path, tmp_path: Path
) -> None:
    for command in ("report", "query"):
        done = call(command, run.path, "--queries", queries, "--output", tmp_path / "nowhere" / "answer.html")
        assert "create it first" in usage_error(done) and done.stdout == ""
