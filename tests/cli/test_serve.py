"""The command that serves the explorer, as far as it refuses."""

from __future__ import annotations

import socket
import sys
from json import loads
from pathlib import Path

import pytest

import logix_like as logix
from tests.cli.calling import call, refused, usage_error


def test_a_port_in_use_is_said(run: logix.Run) -> None:
    pytest.importorskip("starlette")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(call("serve", run.path, "--port", port))
    assert f"port {port} of 127.0.0.1 cannot be used" in line and "--port 0" in line


def test_what_is_no_store_is_not_served(tmp_path: Path) -> None:
    assert "holds no store" in refused(call("serve", tmp_path))


def test_an_address_that_is_not_ours_is_said(run: logix.Run) -> None:
    pytest.importorskip("starlette")
    assert "cannot be used" in refused(call("serve", run.path, "--host", "192.0.2.1"))


def test_serving_needs_its_packages(run: logix.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'logix_like[serve]'" in refused(call("serve", run.path))


def test_a_model_that_is_no_pair_is_said(run: logix.Run) -> None:
    assert "must return (model, loss_fn)" in usage_error(call("serve", run.path, "--model", "builtins:dict"))


@pytest.mark.parametrize("json", [False, True])
def test_the_address_is_told(run: logix.Run, monkeypatch: pytest.MonkeyPatch, json: bool) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    done = call("serve", run.path, "--port", 0, *(["--json"] if json else []))
    assert done.exit_code == 0
    if json:
        assert loads(done.stdout)["address"].startswith("http://127.0.0.1:") and done.stderr == ""
    else:
        assert done.stderr.startswith("open http://127.0.0.1:") and done.stdout == ""
