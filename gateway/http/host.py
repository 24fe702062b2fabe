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

from gateway.http.connection import Connection
from gateway.http.tls import HttpsContext
from moe_core.errors import ConfigError
from moe_core.service.addresses import bound_socket, join_address
from moe_core.service.certificates import Certificates

BACKLOG = 2048


class HttpHost:
    """One start, one stop; over TLS with `certificates`."""

    def __init__(self, certificates: Certificates | None = None) -> None:
        secured = None if certificates is None else HttpsContext(certificates).context
        self._ssl_context_factory = None if secured is None else lambda *_: secured
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, app: ASGIApp, host: str, port: int) -> int:
        """Listen on host:port (0: any free port) and return the port. Raises ConfigError when
        the port cannot be had."""
        listener = _listen(host, port)
        config = uvicorn.Config(
            app,
            http=Connection,
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ssl_context_factory=self._ssl_context_factory,
        )
        config.load()  # what is missing fails here, and not in the task
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
        listener = bound_socket(host, port)
    except socket.gaierror as error:
        raise ConfigError("host", host, f"is no address: {error.strerror}") from None
    except OSError as error:
        raise _no_port(host, port, error) from None
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _no_port(host, port, error) from None
    listener.setblocking(False)
    return listener


def _no_port(host: str, port: int, error: OSError) -> ConfigError:
    code = error.errno if error.errno in errno.errorcode else None
    reason = os.strerror(code) if code is not None else str(error)
    return ConfigError(
        "port",
        port,
        f"cannot listen on {join_address(host, port)}: {reason}",
        ["another port", "0 (any free one)"],
    )
