"""Workers and gateways of several releases register, over real gRPC: who is taken, who is told."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
import pytest

from moe_core.cluster import Join, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ProtocolError
from moe_core.pb.epserve.v1 import cluster_pb2 as pb
from moe_core.pb.epserve.v1 import cluster_pb2_grpc
from moe_core.protocol import PROTOCOL_VERSION
from moe_core.service.cluster_codec import join_to_pb
from moe_core.service.grpc_host import GrpcHost
from moe_core.service.layout_codec import parallel_to_pb
from moe_core.service.membership import Membership
from support.small_gateway import FINGERPRINT, MODEL, SmallGateway

TIMEOUT_S = 10
SERVICE = "epserve.v1.ClusterService"
JOIN = Join(
    role=Role.EXPERT,
    address="127.0.0.1:7",
    device="cpu",
    pid=1,
    model_fingerprint=FINGERPRINT,
    instance_epoch=1,
    dtype="float32",
    host_id="here",
)


async def registered(gateway: SmallGateway, versions: Sequence[int]) -> Any:  # noqa: ANN401
    """The first answer to a worker that speaks these versions."""
    message = join_to_pb(JOIN)
    message.protocol_versions[:] = versions

    async def requests() -> AsyncIterator[pb.RegisterRequest]:
        yield pb.RegisterRequest(join=message)
        await asyncio.Event().wait()

    call = gateway.cluster_stub.Register(requests(), timeout=TIMEOUT_S)
    try:
        return await anext(aiter(call))
    finally:
        call.cancel()


@pytest.mark.parametrize(
    ("versions", "used"),
    [
        ((), 1),  # the first release does not say
        ((1,), 1),
        ((PROTOCOL_VERSION, PROTOCOL_VERSION + 1), PROTOCOL_VERSION),
    ],
)
async def test_a_worker_of_a_release_next_to_this_one_is_taken(
    versions: tuple[int, ...], used: int
) -> None:
    async with SmallGateway(ParallelConfig()) as gateway:
        answer = await registered(gateway, versions)
        assert answer.assigned.protocol_version == used


async def test_a_worker_of_another_release_is_refused_by_name_with_both_versions() -> None:
    async with SmallGateway(ParallelConfig()) as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await registered(gateway, (PROTOCOL_VERSION + 1,))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        words = refused.value.details() or ""
        assert (
            f"expert process at 127.0.0.1:7 speaks [{PROTOCOL_VERSION + 1}], the gateway" in words
        )


class OtherGateway(cluster_pb2_grpc.ClusterServiceServicer):
    """Assigns rank 0 in a version of the protocol that it chooses by itself."""

    def __init__(self, version: int) -> None:
        self._version = version

    async def Register(
        self,
        requests: AsyncIterator[pb.RegisterRequest],
        context: Any,  # noqa: ANN401
    ) -> AsyncIterator[pb.RegisterResponse]:
        await anext(aiter(requests))
        parallel = parallel_to_pb(ParallelConfig().with_model(MODEL))
        assigned = pb.Assigned(rank=0, parallel=parallel, protocol_version=self._version)
        yield pb.RegisterResponse(assigned=assigned)


async def test_a_worker_leaves_a_gateway_that_chooses_a_version_it_does_not_speak() -> None:
    host = GrpcHost()
    servicer = OtherGateway(PROTOCOL_VERSION + 1)
    host.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, servicer, SERVICE)
    port = await host.start("127.0.0.1", 0)
    try:
        with pytest.raises(ProtocolError, match=f"chose protocol version {PROTOCOL_VERSION + 1}"):
            await Membership.join(f"127.0.0.1:{port}", JOIN, timeout_s=TIMEOUT_S)
    finally:
        await host.stop(0.0)
