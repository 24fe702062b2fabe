"""Both ends of a handover of experts' bytes: a server with a source, and fetches from it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
from torch import Tensor

from moe_core.pb.epserve.v1 import expert_pb2_grpc as rpc
from moe_core.service.grpc_host import GrpcHost
from moe_core.transport.base import Identity, TransportOptions
from moe_core.transport.choice import open_endpoint
from moe_core.transport.endpoint import NixlEndpoint
from moe_core.transport.handover import HandoverSpec, UnitName, digest_of
from moe_core.transport.handover_client import UnitFetch
from moe_core.transport.handover_servicer import FillUnit, HandoverServicer

SERVICE = "epserve.v1.ExpertService"
# Two whole pieces and a bit: what is not a multiple of anything.
SPEC = HandoverSpec("fingerprint", "float32", 0, 1, 2 * (1 << 20) + 12)


def expert_bytes(layer_id: int, logical: int, spec: HandoverSpec = SPEC) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * layer_id + logical)
    return torch.randint(256, (spec.unit_bytes,), generator=generator, dtype=torch.uint8)


async def fill(name: UnitName, memory: Tensor) -> bytes | None:
    """Layers 1 and 2 hold the experts 0 to 7."""
    layer_id, logical = name
    if layer_id not in (1, 2) or logical > 7:
        return None
    memory.copy_(expert_bytes(layer_id, logical))
    return digest_of(memory)


class _OnlyHandover(rpc.ExpertServiceServicer):
    def __init__(self, servicer: HandoverServicer) -> None:
        self.Handover = servicer.Handover


@asynccontextmanager
async def endpoint_of(transport: str, rank: int) -> AsyncIterator[NixlEndpoint | None]:
    endpoint, _ = open_endpoint(Identity(rank, 2, 10 + rank), TransportOptions(transport))
    try:
        yield endpoint
    finally:
        if endpoint is not None:
            endpoint.close()


@asynccontextmanager
async def giving(
    transport: str,
    source: FillUnit = fill,
    spec: HandoverSpec = SPEC,
) -> AsyncIterator[tuple[str, HandoverServicer]]:
    """Its address, and the servicer."""
    async with endpoint_of(transport, 0) as endpoint:
        servicer = HandoverServicer(spec, source, 10, endpoint)
        host = GrpcHost()
        host.add(rpc.add_ExpertServiceServicer_to_server, _OnlyHandover(servicer), SERVICE)
        port = await host.start("127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{port}", servicer
        finally:
            await servicer.close()
            await host.stop(0.0)


@asynccontextmanager
async def fetching(
    address: str, transport: str, endpoint: NixlEndpoint | None, spec: HandoverSpec = SPEC
) -> AsyncIterator[UnitFetch]:
    fetch = UnitFetch(address, f"expert 0 ({address})", spec, None)
    try:
        await fetch.open(1, (transport,), endpoint)
        yield fetch
    finally:
        await fetch.close()
