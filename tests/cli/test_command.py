"""The command itself: its help, its version, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import logix_like as logix
from logix_like.cli import app
from logix_like.cli.app import COMMANDS
from tests.cli.calling import call


def test_help_names_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    listed = result.stdout.partition("Commands:")[2]
    places = [listed.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places) and len(places) == len(app.registered_commands)


def test_every_help_has_an_example_and_tells_the_exit_codes() -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert {"demo", "info", "query", "report"} <= set(names)
    for command in ([], *([name] for name in names)):
        shown = call(*command, "--help").stdout
        assert "Example: logix-like " in shown and "Exit codes: 0 done; 1 refused" in shown, command
        assert not command or "--json" in shown, command


def test_no_command_shows_the_help() -> None:
    assert "Usage" in (result := call()).stdout + result.stderr


def test_the_version_is_printed() -> None:
    assert call("--version").stdout == f"logix_like {logix.__version__}\n"


HEAVY = ("transformers", "faiss", "pandas", "sklearn", "jinja2", "mlxtend")


def test_the_command_in_a_process_of_its_own(run: logix.Run, tmp_path: Path) -> None:
    code = f"import sys; from logix_like.cli import app; assert not set({HEAVY}) & set(sys.modules); app()"
    command = [sys.executable, "-W", "error", "-c", code, "info"]
    done = subprocess.run([*command, str(run.path), "--json"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["rows"] == 46
    failed = subprocess.run([*command, "nowhere"], capture_output=True, text=True, cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
