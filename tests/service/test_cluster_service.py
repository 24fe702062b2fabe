"""Registration: ranks, refusals, states and what a lost stream means, over real gRPC."""

import asyncio
import socket
import time

import grpc
import grpc.aio
import pytest

from gateway.cluster import MemberKey
from moe_core.cluster import ExpertLoad, LinkStats, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import RequestError, UnavailableError
from moe_core.pb.epserve.v1 import cluster_pb2, gateway_pb2
from moe_core.service.addresses import new_instance_epoch
from moe_core.service.cluster_codec import cluster_from_pb, role_to_pb
from support.fake_attention import FakeAttention, FakeWorker
from support.small_gateway import FINGERPRINT, SmallGateway

PARALLEL = ParallelConfig(attn_devices=4, dp_size=2, expert_devices=2, ep_size=2)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_ranks_are_the_lowest_free_ones_and_parts_of_the_tier() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        await gateway.add_worker(Role.ATTN, rank=1)
        await gateway.add_worker(Role.ATTN)
        third = await gateway.add_worker(Role.ATTN)
        expert = await gateway.add_worker(Role.EXPERT)
        assert [member.rank for member in third.membership.state.tier(Role.ATTN)] == [0, 1, 2]
        assert third.membership.rank == 2
        member = third.membership.state.tier(Role.ATTN)[2]
        assert (member.dp_rank, member.tp_rank, member.ep_rank) == (1, 0, None)
        (member,) = expert.membership.state.tier(Role.EXPERT)
        assert (member.ep_rank, member.etp_rank, member.dp_rank) == (0, 0, None)
        assert member.experts == 4
        assert third.membership.parallel == gateway.registry.parallel
        assert expert.membership.state.placement == gateway.registry.state.placement


async def test_taken_rank_is_refused_at_once_naming_its_holder() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        holder = await gateway.add_worker(Role.ATTN, rank=1)
        (member,) = holder.membership.state.tier(Role.ATTN)
        started = time.monotonic()
        with pytest.raises(RequestError, match=f"rank=1: taken by pid .* at {member.address}"):
            await gateway.worker(Role.ATTN, rank=1).start()
        assert time.monotonic() - started < 5


async def test_rank_out_of_range_and_full_tier_are_refused() -> None:
    async with SmallGateway(ParallelConfig()) as gateway:
        with pytest.raises(RequestError, match="rank=3: must be below 1"):
            await gateway.worker(Role.EXPERT, rank=3).start()
        await gateway.add_worker(Role.EXPERT)
        with pytest.raises(RequestError, match="rank: none is left"):
            await gateway.worker(Role.EXPERT).start()


async def test_member_that_leaves_frees_its_rank_and_everybody_learns_it() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        stays = await gateway.add_worker(Role.ATTN)
        leaves = gateway.worker(Role.ATTN)
        await leaves.start()
        await stays.membership.wait_until(lambda s: len(s.tier(Role.ATTN)) == 2, 5, "a second")
        await leaves.stop()
        await stays.membership.wait_until(lambda s: len(s.tier(Role.ATTN)) == 1, 5, "its leaving")
        again = await gateway.add_worker(Role.ATTN)
        assert again.membership.rank == 1


async def test_reports_reach_members_and_get_cluster() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        watcher = await gateway.add_worker(Role.EXPERT)
        worker = await gateway.add_worker(Role.ATTN, FakeAttention(lambda prompt: prompt))
        link = LinkStats("attn 0", "expert 0", "grpc", 1, 2, 3, 4, 5, 6)
        worker.membership.report(
            MemberState.DRAINING, detail="why", store_address="h:1", links=[link]
        )

        def told(state: object) -> bool:
            (member,) = watcher.membership.state.tier(Role.ATTN)
            return (member.state, member.detail) == (MemberState.DRAINING, "why")

        await watcher.membership.wait_until(told, 5, "the report")
        answer = await gateway.stub.GetCluster(gateway_pb2.GetClusterRequest(), timeout=5)
        state = cluster_from_pb(answer)
        (member,) = state.tier(Role.ATTN)
        assert member.links == (link,)
        assert member.store_address == "h:1"
        assert [member.role for member in state.members].count(Role.GATEWAY) == 1


async def test_expert_load_and_status_that_wait_together_both_reach_the_gateway() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        worker = await gateway.add_worker(Role.ATTN)
        load = ExpertLoad((1, 2), (tuple(range(8)), (2**40,) * 8))
        worker.membership.report_expert_load(load)
        worker.membership.report(MemberState.DRAINING, detail="why")
        await worker.membership.wait_until(
            lambda state: state.tier(Role.ATTN)[0].detail == "why", 5, "the report"
        )
        async with asyncio.timeout(5):
            while (member := gateway.registry.state.tier(Role.ATTN)[0]).expert_load is None:
                await asyncio.sleep(0.01)
        assert member.expert_load == load
        assert worker.membership.state.tier(Role.ATTN)[0].expert_load is None


async def test_wait_names_the_ranks_that_are_missing() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        worker = await gateway.add_worker(Role.EXPERT)
        with pytest.raises(UnavailableError, match=r"0\.2 s for all experts.*expert 1: not joined"):
            await worker.membership.wait_until(lambda state: False, 0.2, "all experts")


async def test_worker_waits_for_a_gateway_that_comes_later() -> None:
    async with SmallGateway(PARALLEL) as probe:
        address = probe.address
    gateway = SmallGateway(PARALLEL)
    worker = FakeWorker(address, FINGERPRINT, Role.ATTN)
    joining = asyncio.create_task(worker.start())
    await asyncio.sleep(0.3)
    async with gateway.at(int(address.rpartition(":")[2])):
        async with asyncio.timeout(10):
            await joining
        assert worker.membership.rank == 0
        await worker.stop()


async def test_no_gateway_is_an_error_within_the_deadline(unused_port: int) -> None:
    worker = FakeWorker(f"127.0.0.1:{unused_port}", FINGERPRINT, Role.ATTN)
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=f"127.0.0.1:{unused_port}"):
        await worker.start(join_timeout_s=1)
    assert time.monotonic() - started < 5


async def test_lease_of_a_stalled_loop_shows_in_the_members_detail() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        worker = await gateway.add_worker(Role.ATTN)
        (member,) = worker.membership.state.tier(Role.ATTN)
        lease = cluster_pb2.LeaseRequest(
            role=role_to_pb(Role.ATTN),
            rank=0,
            instance_epoch=member.instance_epoch,
            loop_idle_ms=60_000,
        )
        await gateway.cluster_stub.Lease(lease, timeout=5)
        assert "without progress" in gateway.registry.state.tier(Role.ATTN)[0].detail
        lease.instance_epoch = new_instance_epoch()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.cluster_stub.Lease(lease, timeout=5)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_worker_sends_leases_by_itself() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        worker = await gateway.add_worker(Role.ATTN)
        seen = asyncio.Event()
        take = gateway.registry.lease

        def lease(key: MemberKey, idle_ms: int, tasks: int) -> None:
            take(key, idle_ms, tasks)
            seen.set()

        gateway.registry.lease = lease  # type: ignore[method-assign]
        async with asyncio.timeout(10):
            await seen.wait()
        (member,) = gateway.registry.state.tier(Role.ATTN)
        # This loop is the gateway's and the worker's. Nothing that was begun has yet to end.
        assert member.loop_tasks == pytest.approx(len(asyncio.all_tasks()), abs=2)
        assert worker.membership.rank == 0


async def test_first_message_must_be_a_join() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        call = gateway.cluster_stub.Register(timeout=5)
        await call.write(cluster_pb2.RegisterRequest(status=cluster_pb2.StatusReport()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "must be a Join" in (caught.value.details() or "")
