"""All methods of a running server, found by asking it, and how each of them answers a stranger.

Knows reflection and nothing of what the services are, so what is added to a server is found here.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from moe_core.service.peer_roles import PeerRole

TIMEOUT_S = 5.0
Metadata = Sequence[tuple[str, str]]


def channel_to(
    address: str, credentials: grpc.ChannelCredentials, server: PeerRole
) -> grpc.aio.Channel:
    options = (
        ("grpc.ssl_target_name_override", server.dns_name),
        ("grpc.use_local_subchannel_pool", 1),  # else two channels may share one connection
    )
    return grpc.aio.secure_channel(address, credentials, options)


async def all_methods(channel: grpc.aio.Channel, metadata: Metadata = ()) -> list[str]:
    """The paths of all methods, by the server's own word."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest

    async def ask(question: reflection_pb2.ServerReflectionRequest) -> Any:  # noqa: ANN401
        (answer,) = [
            each
            async for each in stub.ServerReflectionInfo(
                iter([question]), metadata=metadata, timeout=TIMEOUT_S
            )
        ]
        return answer

    listed = await ask(request(list_services=""))
    paths = set()
    for service in listed.list_services_response.service:
        found = await ask(request(file_containing_symbol=service.name))
        for encoded in found.file_descriptor_response.file_descriptor_proto:
            paths |= set(_paths(FileDescriptorProto.FromString(encoded), service.name))
    return sorted(paths)


def _paths(file: FileDescriptorProto, wanted: str) -> list[str]:
    return [
        f"/{wanted}/{method.name}"
        for service in file.service
        if f"{file.package}.{service.name}" == wanted
        for method in service.method
    ]


async def answer_of(channel: grpc.aio.Channel, path: str, metadata: Metadata) -> grpc.StatusCode:
    """The status of `path` for one empty message; OK as soon as it answers anything."""

    async def one_message() -> AsyncIterator[bytes]:
        yield b""

    call = channel.stream_stream(path)(one_message(), metadata=metadata, timeout=TIMEOUT_S)
    try:
        await call.read()
        return await call.code() if call.done() else grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        return error.code()
    finally:
        call.cancel()
