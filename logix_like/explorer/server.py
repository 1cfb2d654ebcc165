"""Starting the explorer: a port, a token, an address to open."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from typing import Any

from logix_like.errors import ConfigError, LogixError, MissingDependencyError
from logix_like.explorer.state import Explorer

SETTINGS: dict[str, Any] = {
    "log_level": "warning",
    "access_log": False,
    "server_header": False,
    "proxy_headers": False,
    "http": "h11",
    "h11_max_incomplete_event_size": 2**21,
}
"""How uvicorn is run: a typed query stands in the address, so that addresses as long as browsers send are taken."""


def serve(explorer: Explorer, host: str, port: int, told: Callable[[str], object]) -> None:
    """Serve ``explorer`` until it is interrupted; ``told`` is given the address to open.

    Args:
        explorer: What is shown.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        told: Called once, before the first request can be answered.

    Raises:
        MissingDependencyError: starlette or uvicorn is not installed.
        ConfigError: the port is in use or the address is not this machine's.
    """
    try:
        import uvicorn

        from logix_like.explorer.app import LOCAL, make_app
    except ImportError as error:
        if isinstance(error, LogixError):
            raise
        raise MissingDependencyError(
            f"the explorer needs starlette and uvicorn ({error}): pip install 'logix_like[serve]'"
        ) from error
    listening = listen(host, port)
    token = secrets.token_urlsafe(24)
    name = f"[{host}]" if ":" in host else host
    app = make_app(explorer, token, ["*"] if host in ("0.0.0.0", "::") else [*LOCAL, name])
    config = uvicorn.Config(app, **SETTINGS)
    with listening:
        told(f"http://{name}:{listening.getsockname()[1]}/?token={token}")
        uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; :class:`ConfigError` where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"{host!r} is no address to listen on ({error}); use 127.0.0.1") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"port {port} of {host} cannot be used ({error.strerror}); choose another with --port, or --port 0 for any "
            "free one"
        ) from error
    return listening
