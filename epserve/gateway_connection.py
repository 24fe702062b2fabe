"""A gateway that is asked: its address, how to know it, and the channel to it.

Knows TLS files and API keys. Knows no service.
"""

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc.aio

from moe_core.errors import ConfigError, EpserveError, UnavailableError
from moe_core.service.access import AUTHORIZATION
from moe_core.service.certificates import Certificates, ServerCheck
from moe_core.service.grpc_channel import error_from_rpc, open_channel
from moe_core.service.peer_roles import PeerRole
from moe_core.service.tls_files import TlsFiles

# gRPC's words for a connection that the other end closed before it was one.
NOT_CONNECTED, CLOSED = "failed to connect", "Socket closed"


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway: its HOST:PORT, how to know it (`tls` None: in the clear), and the key to show."""

    address: str
    tls: TlsFiles | None = None
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def of_options(
        cls,
        address: str,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        api_key: str | None,
    ) -> Self:
        """What the options of every command that asks a gateway say. Raises ConfigError."""
        return cls(address, TlsFiles.of_client(tls_ca, tls_cert, tls_key), api_key)


class GatewayConnection:
    """A channel to a gateway and what is shown on it. Async context manager."""

    def __init__(self, target: str | Target) -> None:
        """Raises ConfigError for TLS files or a key that cannot be used."""
        if isinstance(target, str):
            target = Target(target)
        self.target = target.address
        self._metadata = _metadata(target.api_key)
        self._tls = target.tls
        self._channel = open_channel(target.address, _server_check(target.tls))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(None)

    def _failed(self, error: grpc.aio.AioRpcError, doing: str) -> EpserveError:
        """What a caller is told of a call that failed."""
        told = error_from_rpc(error, f"{doing} at {self.target}")
        details = error.details() or ""
        closed = details.startswith(NOT_CONNECTED) and details.endswith(CLOSED)
        if self._tls is None and closed:
            return UnavailableError(f"{told}; if it speaks TLS, give --tls-ca")
        return told


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    if not api_key:
        return ()
    if not api_key.isascii() or not api_key.isprintable():
        raise ConfigError("api_key", "…", "must be printable ASCII")  # a key is never shown
    return ((AUTHORIZATION, f"Bearer {api_key}"),)


def _server_check(tls: TlsFiles | None) -> ServerCheck | None:
    return None if tls is None else ServerCheck(Certificates(tls), PeerRole.GATEWAY)
