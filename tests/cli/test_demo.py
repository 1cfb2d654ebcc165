"""The demo, for scripts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from logix_like.examples import quickstart

from tests.cli.calling import call


def test_the_demo_tells_scripts_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = quickstart.Outcome(str(tmp_path / "demo"), 12, 3.5, 0.75, 0.875)

    def main(root: Path | None, *, overwrite: bool) -> quickstart.Outcome:
        assert (root, overwrite) == (tmp_path, True)
        sys.stdout.write("words for people\n")
        return outcome

    monkeypatch.setattr(quickstart, "main", main)
    done = call("demo", "--root", tmp_path, "--overwrite", "--json")
    assert json.loads(done.stdout) == vars(outcome) and "words for people" in done.stderr
    assert call("demo", "--root", tmp_path, "--overwrite").stdout == "words for people\n"
