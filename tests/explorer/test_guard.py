"""Who is let in, and who is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from starlette.testclient import TestClient

from logix_like.explorer.app import make_app
from logix_like.explorer.state import Explorer
from tests.explorer.stores import TEXTS

TOKEN = "a-token"
HERE = "http://127.0.0.1:8799"


@pytest.fixture(scope="module")
def explorer(texts: tuple[Path, nn.Module]) -> Explorer:
    return Explorer(texts[0], TEXTS)


@pytest.fixture
def stranger(explorer: Explorer) -> Iterator[TestClient]:
    with TestClient(make_app(explorer, TOKEN), base_url=HERE, follow_redirects=False) as client:
        yield client


@pytest.fixture
def guest(stranger: TestClient) -> TestClient:
    assert stranger.get("/", params={"token": TOKEN}).status_code == 303
    return stranger


PATHS = ["/", "/ask", "/health", "/follow.json", "/assets/style.css", "/assets/explorer.js", "/nothing"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", [None, "", "A-token", "a-token2", "ä"])
def test_nobody_is_let_in_without_the_token(stranger: TestClient, path: str, token: str | None) -> None:
    answer = stranger.get(path, params={} if token is None else {"token": token})
    assert answer.status_code == 403
    assert "token that 'logix-like serve' printed" in answer.text
    assert "set-cookie" not in answer.headers


def test_the_token_becomes_a_cookie_and_leaves_the_address(stranger: TestClient) -> None:
    answer = stranger.get("/ask", params={"token": TOKEN, "sample": "sa b&c"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/ask?sample=sa+b%26c")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie
    assert stranger.get("/").status_code == 200


def test_a_redirect_stays_here(stranger: TestClient) -> None:
    answer = stranger.get(f"{HERE}//elsewhere.example/x?token={TOKEN}")
    assert answer.headers["location"] == "/elsewhere.example/x"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8799", "169.254.169.254", ""])
def test_other_names_are_refused_against_dns_rebinding(guest: TestClient, host: str) -> None:
    answer = guest.get("/", headers={"host": host})
    assert answer.status_code == 400
    assert "Samples" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:8799", "localhost:8799", "localhost"])
def test_its_own_names_are_answered(guest: TestClient, host: str) -> None:
    guest.cookies.set("logix-like-8799", TOKEN)
    answer = guest.get("/", headers={"host": host, "cookie": f"logix-like-8799={TOKEN}"})
    assert answer.status_code == 200


def test_no_other_site_may_read(guest: TestClient) -> None:
    for method in ("GET", "OPTIONS"):
        answer = guest.request(method, "/follow.json", headers={"origin": "http://evil.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]
    headers = guest.get("/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe-inline" not in headers["content-security-policy"].split("script-src")[1].split(";")[0]
    assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": HERE, "sec-fetch-site": "same-origin"}, 303),
    ],
)
def test_other_sites_may_not_change_anything(guest: TestClient, headers: dict[str, str], status: int) -> None:
    assert guest.post("/verify", headers=headers).status_code == status


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/assets/../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2fzarr.json",
        "/assets/zarr.json",
        "/zarr.json",
        "//etc/passwd",
        "/assets/style.css/../../zarr.json",
    ],
)
def test_there_are_no_paths_into_the_disk(guest: TestClient, path: str) -> None:
    answer = guest.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text and "zarr_format" not in answer.text
