"""An expert process that the cluster takes for failed, although its link works, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import torch

from attn_service.expert_client import ExpertClient
from attn_service.expert_links import ExpertLinks
from attn_service.experts import StepKey
from attn_service.placements import Placements
from expert_service.process import ExpertProcess
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.exchange import link_spec
from moe_core.model.tensor_parallel import NoTensorParallel
from moe_core.service.membership import Membership
from moe_core.transport.base import ANY_WORLD, ExpertLink, Identity
from moe_core.transport.connect import connect_link
from support.expert_processes import (
    MODEL_DIR,
    OPTIONS,
    TIMEOUT_S,
    expected,
    join_as_attention,
    running_expert,
    running_registry,
)
from support.expert_tier import CPU, random_routing

PARALLEL = ParallelConfig(
    expert_devices=2, ep_size=2, expert_parallel_degree=2, num_redundant_experts=16
)


def silence(process: ExpertProcess) -> None:
    """Its leases end, as if their way to the gateway were cut; all else goes on."""
    assert process._membership is not None
    lease = process._membership._registration._lease
    assert lease is not None
    lease.stop()


def expert_is(rank: int, wanted: MemberState) -> Callable[[ClusterState], bool]:
    return lambda state: [m.state for m in state.tier(Role.EXPERT) if m.rank == rank] == [wanted]


@asynccontextmanager
async def attention(checkpoint: Checkpoint, membership: Membership) -> AsyncIterator[ExpertLinks]:
    spec = link_spec(
        checkpoint.config,
        membership.parallel,
        model_fingerprint=checkpoint.fingerprint(),
        dtype=torch.float64,
        spare_slots=OPTIONS.spare_slots,
    )

    async def connect(member: Member) -> ExpertLink:
        peer = Identity(member.rank, ANY_WORLD, member.instance_epoch)
        return await connect_link(member.address, spec, Identity(0, 1, 1), peer, OPTIONS)

    links = ExpertLinks(1, connect)
    try:
        yield links
    finally:
        await links.close()


async def test_it_is_not_asked_until_it_has_joined_again_and_then_it_is() -> None:
    checkpoint = Checkpoint.open(MODEL_DIR)
    layer_id = checkpoint.config.moe_layer_ids[0]
    routing = random_routing(checkpoint.config, 5, torch.float64, 1)
    alone = expected(checkpoint, layer_id, routing, False)
    async with AsyncExitStack() as stack:
        address, _ = await stack.enter_async_context(running_registry(PARALLEL))
        experts = [
            await stack.enter_async_context(running_expert(address, rank=rank)) for rank in (0, 1)
        ]
        membership = await join_as_attention(address, checkpoint)
        stack.push_async_callback(membership.close)
        links = await stack.enter_async_context(attention(checkpoint, membership))
        client = ExpertClient(
            links.peers,
            membership.parallel,
            Placements(membership.state.placement, CPU),
            NoTensorParallel(),
            expert_wait_s=TIMEOUT_S,
        )

        async def until(wanted: MemberState) -> ClusterState:
            return await membership.wait_until(expert_is(1, wanted), TIMEOUT_S, f"{wanted}")

        async def check(step: int) -> list[int]:
            """The sum is right; how many dispatches each link has carried."""
            pending = await client.dispatch(
                StepKey(0, step), layer_id, routing.hidden, routing.topk_ids, routing.topk_weights
            )
            combined = await pending.combine()
            assert combined.lost == ()
            torch.testing.assert_close(combined.hidden_states, alone, rtol=1e-12, atol=1e-12)
            return [link.counters.dispatches for _, link in sorted(links.peers.links.items())]

        await membership.wait_until(expert_is(0, MemberState.READY), TIMEOUT_S, "expert 0")
        await links.reconcile(await until(MemberState.READY))
        assert await check(1) == [1, 1]
        silence(experts[1])
        links.give_up(await until(MemberState.FAILED))
        assert "expert 1: the cluster takes it for failed, no lease for 3 s" in lost(links)
        assert await check(2) == [2, 1]
        experts[1]._report()  # it speaks again, and is told to join again
        async with asyncio.timeout(TIMEOUT_S):
            await membership.wait_until(
                lambda state: not expert_is(1, MemberState.FAILED)(state), TIMEOUT_S, "its leaving"
            )
        await links.reconcile(await until(MemberState.READY))
        assert links.missing == ()
        assert await check(3) == [3, 1]


def lost(links: ExpertLinks) -> list[str]:
    found = sorted(links.peers.links.items())
    return [f"expert {rank}: {link.lost_because}" for rank, link in found]
