"""Who may talk to the explorer: whoever has the token, by the server's own name, from the server's own pages."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "token"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
REFUSED = (
    "403: this page needs the token that 'logix-like serve' printed when it started.\n"
    "Open the whole address from the terminal, ?token=... included.\n"
)


class Guard:
    """Middleware that lets nobody in without the token.

    The token comes once in the address; a cookie that scripts cannot read takes its place, and the address is shown
    without it. Other sites' pages may link here (the printed address is often opened from one: a notebook's terminal,
    a chat), which ``SameSite=Strict`` would answer by a refusal; they can neither send the cookie with anything but
    such a link nor frame a page. Requests that change something must come from the server's own pages. There are no
    CORS headers: no other site's script can read an answer. (That the server is asked by its own name, against
    DNS rebinding, is checked by starlette's ``TrustedHostMiddleware`` in front of this.)
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        handle = self._app if refusal is None else refusal
        await handle(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == TOKEN]
        cookie = cookie_parser(headers.get("cookie", "")).get(self._cookie(scope), "")
        if given and self._fits(given[-1]) and scope["method"] == "GET":
            return self._let_in(scope, [pair for pair in query if pair[0] != TOKEN])
        if not self._fits(cookie):
            return PlainTextResponse(REFUSED, status_code=403)
        if scope["method"] not in ("GET", "HEAD") and not _same_site(headers):
            return PlainTextResponse("403: this request did not come from the explorer's own pages\n", status_code=403)
        return None

    def _fits(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())

    def _let_in(self, scope: Scope, query: list[tuple[str, str]]) -> Response:
        path = "/" + scope["path"].lstrip("/")  # never another host's address
        response = RedirectResponse(path + ("?" + urlencode(query) if query else ""), status_code=303)
        response.set_cookie(self._cookie(scope), self._token, httponly=True, samesite="lax")
        return response

    @staticmethod
    def _cookie(scope: Scope) -> str:
        """Cookies do not tell ports apart, so the name does."""
        server = scope.get("server") or ("", 0)
        return f"logix-like-{server[1]}"


def _same_site(headers: Headers) -> bool:
    fetched = headers.get("sec-fetch-site")
    if fetched is not None and fetched not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def _with_headers(send: Callable[[Message], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return sending
