"""Channels to other processes, and the two ways between gRPC statuses and EpserveErrors.

Knows gRPC's options and status names. Knows no service and no message.
"""

import math
from collections.abc import Sequence

import grpc
import grpc.aio

from moe_core.errors import (
    AccessError,
    AuthenticationError,
    EpserveError,
    NotFoundError,
    PeerTimeoutError,
    RequestError,
    TooManyRequestsError,
    UnavailableError,
)
from moe_core.service.certificates import ServerCheck

RETRY_AFTER = "retry-after"  # trailing metadata of TooManyRequestsError: whole seconds
MAX_MESSAGE_BYTES = 64 * 2**20
# A frozen peer is noticed after time + timeout at the latest; a busy one answers pings from gRPC's
# own threads (docs/decisions/0013-frozen-peers.md). Without `ping_timeout_ms` gRPC waits a minute,
# whatever the keepalive timeout says.
KEEPALIVE_TIME_MS = 1_000
KEEPALIVE_TIMEOUT_MS = 1_500

KEEPALIVE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
RECONNECT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
# What gRPC says of a server that speaks HTTP/1 only, in the clear and over TLS.
_HTTP_SERVER_WORDS = ("http1.x server", "missing selected ALPN")


class RemoteError(EpserveError):
    """Another process answered with a status for which there is no class of its own here."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


def size_options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
    )


def channel_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> Sequence[tuple[str, int]]:
    return (*KEEPALIVE_OPTIONS, *RECONNECT_OPTIONS, *size_options(max_message_bytes))


def server_name_options(security: ServerCheck) -> tuple[tuple[str, str], ...]:
    """The TLS library checks the name of a host: it is given the role's, whatever the address."""
    return (("grpc.ssl_target_name_override", security.role.dns_name),)


def open_channel(
    address: str,
    security: ServerCheck | None = None,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """A channel to `address` (host:port) that notices a frozen peer and reconnects quickly; over
    TLS with `security`, else in the clear."""
    options = channel_options(max_message_bytes)
    if security is None:
        return grpc.aio.insecure_channel(address, options=options)
    credentials = security.certificates.channel_credentials()
    named = (*options, *server_name_options(security))
    return grpc.aio.secure_channel(address, credentials, options=named)


def status_code(error: EpserveError) -> grpc.StatusCode:
    """The status that `error` is answered with."""
    return grpc.StatusCode[error.code]


def trailing_metadata(error: EpserveError) -> tuple[tuple[str, str], ...]:
    """What is said of `error` beside its status and message."""
    if not isinstance(error, TooManyRequestsError):
        return ()
    return ((RETRY_AFTER, str(max(1, math.ceil(error.retry_after_s)))),)


def error_from_status(code: str, message: str) -> EpserveError:
    """The error that a status name and its message stand for."""
    classes: dict[str, type[EpserveError]] = {
        "INVALID_ARGUMENT": RequestError,
        "NOT_FOUND": NotFoundError,
        "UNAUTHENTICATED": AuthenticationError,
        "PERMISSION_DENIED": AccessError,
        "UNAVAILABLE": UnavailableError,
        "DEADLINE_EXCEEDED": PeerTimeoutError,
    }
    found = classes.get(code)
    return RemoteError(code, message) if found is None else found(message)


def error_from_rpc(error: grpc.aio.AioRpcError, doing: str) -> EpserveError:
    """The error of a failed call; `doing` says what was being done, and to whom."""
    details = error.details() or "no details given"
    if details.startswith("Stream removed") and error.code() is grpc.StatusCode.UNAVAILABLE:
        details = f"the connection broke: {details}"  # gRPC's own words do not say whose end it was
    if any(words in details for words in _HTTP_SERVER_WORDS):
        details = (
            "what answers there is an HTTP server, and not gRPC; a gateway's gRPC port is that of "
            "--grpc-port (50051 by default), its HTTP port that of --port"
        )
    if error.code() is grpc.StatusCode.CANCELLED:
        # A caller that cancels gets asyncio's CancelledError. This is a call that reached a server
        # just as that one stopped, which gRPC drops.
        reason = f"the other end let go of the call, as one that stops does: {details}"
        return UnavailableError(f"{doing}: {reason}")
    message = f"{doing}: {details}"
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        for name, value in error.trailing_metadata() or ():
            if name == RETRY_AFTER and str(value).isdecimal():
                return TooManyRequestsError(message, float(value))
    return error_from_status(error.code().name, message)
