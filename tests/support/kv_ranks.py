"""Ranks of attention groups that only hold KV blocks: a cache, its hand-overs and a server."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import torch

from attn_service.kv_blocks import BlockPool
from attn_service.kv_handover import KvHandover
from attn_service.parked import ParkedBlocks
from attn_service.servicer import SERVICE_NAME, AttentionServicer, add_to_server
from attn_service.tensor_parallel import GroupRank
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.model.kv_cache import KvCache
from moe_core.placement import ExpertPlacement
from moe_core.service.grpc_host import GrpcHost
from moe_core.transport.base import Identity, TransportOptions
from moe_core.transport.choice import open_endpoint
from support.moe_configs import moe_model

CPU = torch.device("cpu")
BLOCKS = 40
MODEL = moe_model(num_layers=3)


@dataclass
class Ranks:
    """As their cluster's state has them."""

    tp_size: int
    members: list[Member] = field(default_factory=list)

    @property
    def state(self) -> ClusterState:
        size = 2 * self.tp_size
        parallel = ParallelConfig(attn_devices=size, dp_size=2).with_model(MODEL)
        return ClusterState(
            1, parallel, tuple(self.members), ExpertPlacement.initial(MODEL, parallel)
        )


@dataclass
class Rank:
    cache: KvCache
    handover: KvHandover
    servicer: AttentionServicer
    parked: ParkedBlocks
    pool: BlockPool

    def read(self, blocks: Sequence[int]) -> list[torch.Tensor]:
        return [part[torch.tensor(blocks)] for part in self.cache.parts]


def filled_cache(seed: int, tp_size: int, block_size: int = 4) -> KvCache:
    cache = KvCache.allocate(MODEL, False, tp_size, BLOCKS, block_size, torch.float64, CPU)
    generator = torch.Generator().manual_seed(seed)
    for part in cache.parts:
        part.copy_(torch.rand(part.shape, generator=generator, dtype=part.dtype))
    return cache


@asynccontextmanager
async def rank_of(
    ranks: Ranks,
    dp_rank: int,
    tp_rank: int,
    transport: str,
    *,
    block_size: int = 4,
    fingerprint: str = "fingerprint",
) -> AsyncIterator[Rank]:
    rank = dp_rank * ranks.tp_size + tp_rank
    cache = filled_cache(rank, ranks.tp_size, block_size)
    identity = Identity(rank, 2 * ranks.tp_size, 100 + rank)
    options = TransportOptions(transport)
    endpoint, _ = open_endpoint(identity, options)
    group = GroupRank(dp_rank, tp_rank, ranks.tp_size)
    handover = KvHandover(
        cache, fingerprint, identity, group, options, endpoint, None, lambda: ranks.state
    )
    pool = BlockPool(BLOCKS, block_size)
    parked = ParkedBlocks(pool)
    servicer = AttentionServicer()
    servicer.hand_over(handover)
    if tp_rank == 0:
        handover.lead(parked.release)
    else:
        servicer.follow("it follows", 100 + dp_rank * ranks.tp_size)
    host = GrpcHost()
    host.add(add_to_server, servicer, SERVICE_NAME)
    port = await host.start("127.0.0.1", 0)
    member = Member(
        role=Role.ATTN,
        rank=rank,
        pid=1,
        address=f"127.0.0.1:{port}",
        device="cpu",
        state=MemberState.READY,
        instance_epoch=100 + rank,
        host_id="here",
        dp_rank=dp_rank,
        tp_rank=tp_rank,
    )
    ranks.members.append(member)
    try:
        yield Rank(cache, handover, servicer, parked, pool)
    finally:
        parked.release_all()
        await handover.close()
        await host.stop(0)
        if endpoint is not None:
            endpoint.close()


@asynccontextmanager
async def two_groups(tp_size: int, transport: str) -> AsyncIterator[tuple[Ranks, list[list[Rank]]]]:
    """Ranks by dp_rank and tp_rank."""
    ranks = Ranks(tp_size)
    async with AsyncExitStack() as stack:
        groups = [
            [
                await stack.enter_async_context(rank_of(ranks, dp_rank, tp_rank, transport))
                for tp_rank in range(tp_size)
            ]
            for dp_rank in range(2)
        ]
        yield ranks, groups


def renewed(ranks: Ranks, rank: int) -> None:
    """The process of that rank was started again."""
    ranks.members[rank] = replace(ranks.members[rank], instance_epoch=999)
