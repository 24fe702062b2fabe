"""One gRPC server as every process of epserve runs it.

Knows health, reflection, limits, keepalive and how a port is bound. Knows no service: servicers
are added by those who own them, strict_handlers.py says what they answer when they fail, and
access.py who may call them.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from moe_core.errors import ConfigError
from moe_core.service.access import AccessCheck, Authenticate, require_rule
from moe_core.service.addresses import join_address
from moe_core.service.certificates import Certificates
from moe_core.service.grpc_channel import KEEPALIVE_OPTIONS, MAX_MESSAGE_BYTES, size_options
from moe_core.service.strict_handlers import Check, Handler, strict_handlers

Servicer = TypeVar("Servicer")
AddServicer = Callable[[Servicer, grpc.aio.Server], None]

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *KEEPALIVE_OPTIONS,
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    # Otherwise a second process may share the port silently, and get half of the calls.
    ("grpc.so_reuseport", 0),
)


class _StrictServer:
    """Stands in for the server while generated code registers its handlers."""

    def __init__(self, server: grpc.aio.Server, check: Check) -> None:
        self._server = server
        self._check = check

    def add_generic_rpc_handlers(self, handlers: Sequence[object]) -> None:
        """Nothing: generated code offers the same handlers by name as well."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        require_rule(service)
        strict = strict_handlers(service, handlers, self._check)
        generic = grpc.method_handlers_generic_handler(service, strict)
        self._server.add_generic_rpc_handlers((generic,))


class GrpcHost:
    """A server for the servicers that were added before `start`; one start, one stop.

    `tls` None listens in the clear. `authenticate` is asked where a key is needed (access.py)."""

    def __init__(
        self,
        tls: Certificates | None = None,
        authenticate: Authenticate | None = None,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._options = (*SERVER_OPTIONS, *size_options(max_message_bytes))
        self._tls = tls
        self._check = AccessCheck(authenticate).check
        self.cluster_port: int | None = None
        self._additions: list[Callable[[Any], None]] = []
        self._names = [health.SERVICE_NAME, reflection.SERVICE_NAME]
        self._health = health.aio.HealthServicer()
        self._health_updates: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None

    def add(
        self, add_servicer: AddServicer[Servicer], servicer: Servicer, service_full_name: str
    ) -> None:
        """Serve `servicer`, as the generated `add_…Servicer_to_server` registers it."""
        self._additions.append(lambda server: add_servicer(servicer, server))
        self._names.append(service_full_name)

    async def start(self, host: str, port: int, *, cluster_port: int | None = None) -> int:
        """Listen on host:port (0: any free port) and return the port. Health is NOT_SERVING
        until `set_ready`. Raises ConfigError when the port cannot be had.

        Over TLS every caller must show a certificate, unless there is a `cluster_port` (0: any
        free port): then those on it must, and `port` is for clients, who are asked for none. Both
        serve the same."""
        server = grpc.aio.server(options=self._options)
        strict: Any = _StrictServer(server, self._check)
        for add in self._additions:
            add(strict)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, strict)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(service_names=self._names),
            strict,
        )
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        bound = _bind(server, host, port, self._credentials(cluster_port is None))
        if cluster_port is not None:
            credentials = self._credentials(True)
            assert credentials is not None, "a cluster port is for certificates"
            self.cluster_port = _bind(server, host, cluster_port, credentials)
        await server.start()
        self._server = server
        return bound

    def _credentials(self, ask_clients: bool) -> grpc.ServerCredentials | None:
        if self._tls is None:
            return None
        return self._tls.server_credentials(ask_clients=ask_clients)

    def set_ready(self, ready: bool) -> None:
        """Answer health checks with SERVING or NOT_SERVING from now on."""
        response = health_pb2.HealthCheckResponse
        status = response.SERVING if ready else response.NOT_SERVING
        update = asyncio.ensure_future(self._health.set("", status))
        self._health_updates.add(update)
        update.add_done_callback(self._health_updates.discard)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s` seconds, then end them."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace_s)


def _bind(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None
) -> int:
    address = join_address(host, port)
    reason = _why_not_bindable(host, port)
    if reason is None:
        try:
            if credentials is not None:
                return server.add_secure_port(address, credentials)
            return server.add_insecure_port(address)
        except RuntimeError:
            reason = _why_not_bindable(host, port) or "gRPC cannot bind it"
    raise ConfigError(
        "port", port, f"cannot listen on {address}: {reason}", ["another port", "0 (any free one)"]
    )


def _why_not_bindable(host: str, port: int) -> str | None:
    """Asks the system before gRPC does, which would say it in five lines and no reason."""
    try:
        flags = socket.AI_PASSIVE
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except socket.gaierror as error:
        raise ConfigError("host", host, f"is no address: {error.strerror}") from None
    except OSError as error:
        code = error.errno if error.errno in errno.errorcode else None
        return os.strerror(code) if code is not None else str(error)
    return None
