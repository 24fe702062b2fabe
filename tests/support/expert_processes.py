"""Whole expert processes in this event loop, a gateway or its registry, and a client of theirs.

Knows how they are started and stopped; the tests say what happens in between.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import torch

import epserve
from attn_service.expert_client import ExpertClient
from attn_service.peers import Peers
from attn_service.placements import Placements
from expert_service.process import ExpertProcess, ExpertSettings
from gateway.cluster import Registry
from gateway.cluster_servicer import ClusterServicer
from gateway.leadership import SoleGateway
from gateway.process import GatewayService
from gateway.settings import GatewaySettings
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expert_loader import load_expert_weights
from moe_core.cluster import ClusterState, Join, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.exchange import link_spec
from moe_core.model.experts import run_experts_by_loop
from moe_core.model.tensor_parallel import NoTensorParallel
from moe_core.placement import ExpertPlacement
from moe_core.service.grpc_host import GrpcHost
from moe_core.service.membership import Membership
from moe_core.transport.base import Identity, TransportOptions
from moe_core.transport.connect import connect_link
from support.expert_tier import CPU, Routing

MODEL_DIR = Path(epserve.__file__).parent / "tiny_model"
OPTIONS = TransportOptions(transport="grpc")
TIMEOUT_S = 60.0


@asynccontextmanager
async def running_registry(
    parallel: ParallelConfig, placement: ExpertPlacement | None = None
) -> AsyncIterator[tuple[str, Registry]]:
    """Its address, and what a test moves the cluster with. Without `placement`: the first."""
    checkpoint = Checkpoint.open(MODEL_DIR)
    settled = parallel.with_model(checkpoint.config)
    gateway = Member(Role.GATEWAY, 0, 1, "127.0.0.1:1", "cpu", MemberState.READY, 1, "here")
    first = placement or ExpertPlacement.initial(checkpoint.config, settled)
    registry = Registry(gateway, settled, first, checkpoint.fingerprint())
    servicer = ClusterServicer(registry, SoleGateway())
    host = GrpcHost()
    servicer.add_to(host)
    port = await host.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}", registry
    finally:
        servicer.close()
        await host.stop(1.0)


@asynccontextmanager
async def running_gateway(parallel: ParallelConfig) -> AsyncIterator[str]:
    gateway = GatewayService(GatewaySettings(MODEL_DIR, "127.0.0.1", 0, parallel))
    await gateway.startup()
    serving = asyncio.create_task(gateway.serve())
    try:
        yield f"127.0.0.1:{gateway.port}"
    finally:
        serving.cancel()
        await asyncio.wait({serving})
        await gateway.drain()


@asynccontextmanager
async def running_expert(gateway: str, **changes: object) -> AsyncIterator[ExpertProcess]:
    settings = {"device": "cpu", "dtype": "float64", "transport": "grpc", "threads": 1, **changes}
    process = ExpertProcess(ExpertSettings(gateway=gateway, model=MODEL_DIR, **settings))
    try:
        await process.startup()
        yield process
    finally:
        await process.drain()


async def join_as_attention(gateway: str, checkpoint: Checkpoint) -> Membership:
    join = Join(
        role=Role.ATTN,
        address="127.0.0.1:1",
        device="cpu",
        pid=1,
        model_fingerprint=checkpoint.fingerprint(),
        instance_epoch=1,
        dtype="float64",
        host_id="here",
    )
    return await Membership.join(gateway, join, timeout_s=TIMEOUT_S)


@asynccontextmanager
async def connected_client(
    state: ClusterState, checkpoint: Checkpoint, placements: Placements | None = None
) -> AsyncIterator[ExpertClient]:
    """Links to all of them. Without `placements`: the one in use."""
    parallel = state.parallel
    spec = link_spec(
        checkpoint.config,
        parallel,
        model_fingerprint=checkpoint.fingerprint(),
        dtype=torch.float64,
        spare_slots=OPTIONS.spare_slots,
    )
    async with AsyncExitStack() as stack:
        links = []
        for member in state.tier(Role.EXPERT):
            peer = Identity(member.rank, parallel.expert_devices, member.instance_epoch)
            link = await connect_link(member.address, spec, Identity(0, 1, 1), peer, OPTIONS)
            stack.push_async_callback(link.close)
            links.append(link)
        yield ExpertClient(
            Peers(parallel.etp_size, links),
            parallel,
            placements or Placements(state.placement, CPU),
            NoTensorParallel(),
            expert_wait_s=TIMEOUT_S,
        )


def expected(checkpoint: Checkpoint, layer_id: int, routing: Routing, shared: bool) -> torch.Tensor:
    """One process that holds every expert, one token and one expert at a time."""
    config = checkpoint.config
    alone = ParallelConfig().with_model(config)
    weights = load_expert_weights(
        checkpoint,
        placement=ExpertPlacement.initial(config, alone),
        ep_rank=0,
        etp_rank=0,
        etp_size=1,
        shared_expert=shared,
        dtype=torch.float64,
        device=CPU,
    )[layer_id]
    ids, scale = routing.topk_ids, routing.topk_weights
    if shared:
        ids = torch.nn.functional.pad(ids, (0, 1), value=config.moe.num_experts)
        scale = torch.nn.functional.pad(scale, (0, 1), value=1.0)
    return run_experts_by_loop(weights, routing.hidden, ids, scale)
