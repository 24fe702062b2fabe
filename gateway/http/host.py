"""uvicorn as the gateway runs it: inside the process's own event loop.

Knows sockets and uvicorn. Signals are the lifecycle's business and logs the process's, so uvicorn
gets neither.
"""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp

from moe_core.errors import ConfigError
from moe_core.service.addresses import join_address

BACKLOG = 2048


class HttpHost:
    """One start, one stop."""

    def __init__(self) -> None:
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, app: ASGIApp, host: str, port: int) -> int:
        """Listen on host:port (0: any free port) and return the port. Raises ConfigError when
        the port cannot be had."""
        listener = _listen(host, port)
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve([listener]), name="http")
        return int(listener.getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Refuse new connections, give requests `grace_s` seconds, then end them."""
        if self._server is None or self._serving is None:
            return
        self._server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # any number of seconds does
        self._server.should_exit = True
        await self._serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(
            host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, where = found[0]
        listener = socket.socket(family, kind, protocol)
    except socket.gaierror as error:
        raise ConfigError("host", host, f"is no address: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        code = error.errno if error.errno in errno.errorcode else None
        reason = os.strerror(code) if code is not None else str(error)
        raise ConfigError(
            "port",
            port,
            f"cannot listen on {join_address(host, port)}: {reason}",
            ["another port", "0 (any free one)"],
        ) from None
    return listener
