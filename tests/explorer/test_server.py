"""By which names the explorer is asked, and how its server is run."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn

from logix_like.errors import ConfigError
from logix_like.explorer import app, server


@pytest.mark.parametrize(
    ("host", "names"),
    [
        ("127.0.0.1", {*app.LOCAL}),
        ("127.0.0.2", {*app.LOCAL, "127.0.0.2"}),
        ("::1", {*app.LOCAL}),
        ("0.0.0.0", {"*"}),
    ],
)
def test_it_is_asked_by_the_name_it_was_given(monkeypatch: pytest.MonkeyPatch, host: str, names: set[str]) -> None:
    asked: list[set[str]] = []

    def make_app(explorer: object, token: str, hosts: list[str]) -> None:
        asked.append(set(hosts))

    monkeypatch.setattr(app, "make_app", make_app)
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    told: list[str] = []
    explorer: Any = None
    try:
        server.serve(explorer, host, 0, told.append)
    except ConfigError:
        pytest.skip(f"this machine has no {host}")
    assert asked == [names] and told[0].startswith("http://")
