"""The explorer's addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from logix_like.errors import LogixError
from logix_like.explorer import pages
from logix_like.explorer.guard import Guard
from logix_like.explorer.state import Explorer
from logix_like.report.templates import render, source

LOCAL = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine for itself."""


def make_app(explorer: Explorer, token: str, hosts: Sequence[str] = LOCAL) -> Starlette:
    """The explorer as an ASGI application.

    Args:
        explorer: What is shown.
        token: Who has it is let in.
        hosts: By which names the server may be asked; any other ``Host`` is refused.
    """
    views = _Views(explorer)
    routes = [
        Route("/", views.samples),
        Route("/ask", views.ask),
        Route("/health", views.health),
        Route("/follow.json", views.follow),
        Route("/verify", views.verify, methods=["POST"]),
        Route("/score", views.score, methods=["POST"]),
        Route("/assets/style.css", views.style),
        Route("/assets/explorer.js", views.script),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)), Middleware(Guard, token=token)]
    return Starlette(routes=routes, middleware=middleware)


class _Views:
    """One method for each address; starlette runs them in threads of its own."""

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer

    def samples(self, request: Request) -> Response:
        return self._page("samples", lambda: pages.samples_page(self._explorer, _asked(request)))

    def ask(self, request: Request) -> Response:
        return self._page("ask", lambda: pages.ask_page(self._explorer, _asked(request)))

    def health(self, request: Request) -> Response:
        return self._page("health", lambda: pages.health_page(self._explorer))

    def follow(self, request: Request) -> Response:
        try:
            self._explorer.refresh()
            return JSONResponse(pages.follow(self._explorer))
        except (LogixError, OSError) as error:
            return JSONResponse({"error": str(error)}, status_code=500)

    def verify(self, request: Request) -> Response:
        self._explorer.verify()
        return RedirectResponse("/health", status_code=303)

    def score(self, request: Request) -> Response:
        self._explorer.score(self._explorer.catalogue(patience=60))
        return RedirectResponse("/", status_code=303)

    def style(self, request: Request) -> Response:
        text = render("style.css.j2") + source("explorer/explorer.css.j2")
        return Response(text, media_type="text/css")

    def script(self, request: Request) -> Response:
        return Response(source("explorer/explorer.js.j2"), media_type="text/javascript")

    def _page(self, name: str, content: Callable[[], Mapping[str, Any]]) -> Response:
        common = {"page": name, "project": self._explorer.store.path.name, "rows": len(self._explorer.store)}
        try:
            page, status = render(f"explorer/{name}.html.j2", **common, **content()), 200
        except (LogixError, OSError) as error:
            page, status = render("explorer/error.html.j2", **common, error=str(error)), 500
        return HTMLResponse(page.encode("utf-8", "backslashreplace"), status_code=status)


def _asked(request: Request) -> dict[str, str]:
    return dict(request.query_params)
