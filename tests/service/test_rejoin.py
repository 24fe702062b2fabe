"""Workers and their gateway lose each other, over real gRPC: who comes back, and who does not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import structlog.testing

from epserve.client import EpserveClient
from gateway.following import Following
from gateway.groups import Group
from gateway.leadership import SoleGateway
from gateway.registrations import NO_LEASE
from moe_core.cluster import AttentionLoad, ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from moe_core.pb.epserve.v1 import cluster_pb2
from moe_core.service.cluster_codec import role_to_pb
from moe_core.service.shared_records import GatewayRecord
from support.fake_attention import FakeAttention, FakeWorker
from support.small_gateway import FINGERPRINT, SmallGateway
from support.stream_ends import Heard

PARALLEL = ParallelConfig(attn_devices=2, dp_size=2, expert_devices=2, ep_size=2)
DEADLINE_S = 20


def ready(state: ClusterState) -> bool:
    return not (state.missing(Role.ATTN) or state.missing(Role.EXPERT))


async def until(gateway: SmallGateway, what: str, done: object) -> ClusterState:
    """The gateway's first state of which `done` is true."""
    assert callable(done)
    try:
        async with asyncio.timeout(DEADLINE_S):
            async for state in gateway.registry.versions.states():
                if done(state):
                    return state
    except TimeoutError:
        pass
    raise AssertionError(f"not {what}: {gateway.registry.state.members}")


def identities(state: ClusterState) -> set[tuple[Role, int, int, str]]:
    return {
        (m.role, m.rank, m.instance_epoch, m.address)
        for m in state.members
        if m.role is not Role.GATEWAY
    }


@asynccontextmanager
async def workers_of(
    gateway: SmallGateway, *, rejoin_timeout_s: float = 20
) -> AsyncIterator[list[FakeWorker]]:
    """A whole cluster's, all READY; the ranks are not those of the order in which they come."""
    ranks = ((Role.ATTN, 1), (Role.EXPERT, 1), (Role.ATTN, 0), (Role.EXPERT, 0))
    workers = [gateway.worker(role, rank) for role, rank in ranks]
    try:
        for worker in workers:
            await worker.start(FakeAttention(list), rejoin_timeout_s=rejoin_timeout_s)
        await until(gateway, "complete", ready)
        yield workers
    finally:
        for worker in workers:
            await worker.stop()


def port_of(gateway: SmallGateway) -> int:
    return int(gateway.address.rpartition(":")[2])


async def test_workers_come_back_to_a_restarted_gateway_as_they_were() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        moved = replace(gateway.registry.state.placement, epoch=3)
        gateway.registry.set_placement(moved, gateway.registry.parallel)
        workers = workers_of(gateway)
        started = await workers.__aenter__()
        before = gateway.registry.state
    try:
        async with SmallGateway(PARALLEL).at(port_of(gateway)) as successor:
            state = await until(successor, "complete again", ready)
            assert identities(state) == identities(before)
            assert state.placement == moved
            assert all(m.attention_load is not None for m in state.tier(Role.ATTN))
            for worker in started:
                await worker.membership.wait_until(ready, 5, "everybody")
    finally:
        await workers.__aexit__(None, None, None)


async def test_no_gateway_in_time_is_the_end_and_says_so() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        worker = gateway.worker(Role.ATTN)
        await worker.start(rejoin_timeout_s=1)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(UnavailableError, match=rf"none took it back .* {gateway.address}"):
            await worker.membership.lost()
    with pytest.raises(UnavailableError, match="lost its gateway"):
        await worker.membership.wait_until(lambda state: False, 5, "nothing")
    await worker.stop()


async def test_a_gateway_that_drains_takes_nobody_back_and_its_end_alarms_nobody() -> None:
    async with SmallGateway(PARALLEL) as gateway, workers_of(gateway) as workers:
        gateway.registry.set_gateway(MemberState.DRAINING)
        for worker in workers:
            await worker.membership.wait_until(is_draining, 5, "the gateway's drain")
        with structlog.testing.capture_logs() as said:
            gateway.cluster.close()
            await until(gateway, "empty", lambda s: len(s.members) == 1)
            await asyncio.sleep(0.5)  # all come back meanwhile
            assert len(gateway.registry.state.members) == 1
    assert not [each for each in said if each["event"] == "joined"]
    ended = [each for each in said if each["event"] == "the registration has ended"]
    assert [each["log_level"] for each in ended] == ["info"] * 4


def is_draining(state: ClusterState) -> bool:
    (member,) = state.tier(Role.GATEWAY)
    return member.state is MemberState.DRAINING


def writers() -> int:
    """Tasks of gRPC's that wait for the next request of a stream."""
    names = [getattr(task.get_coro(), "__name__", "") for task in asyncio.all_tasks()]
    return names.count("_consume_request_iterator")


async def test_attempts_in_vain_leave_no_task_behind() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        worker = gateway.worker(Role.ATTN)
        await worker.start(rejoin_timeout_s=600)
    await asyncio.sleep(1.0)
    await worker.stop()
    await asyncio.sleep(0)
    assert writers() == 0


async def test_streams_that_groups_have_ended_leave_no_task_behind() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        worker = gateway.worker(Role.ATTN)
        await worker.start(FakeAttention(list))
        load = AttentionLoad(0, 0, 64, 64, 4, 64)
        (leader,) = (await until(gateway, "joined", lambda s: s.tier(Role.ATTN))).tier(Role.ATTN)
        stream = gateway.pool.submit(Group(0, leader, load), [], Heard())
        await asyncio.sleep(0.2)  # until it is there
        await worker.stop()
        await asyncio.sleep(0.2)  # until its end is known
        await gateway.pool.close()
        stream.close()
        await asyncio.sleep(0)
        assert writers() == 0


async def test_a_worker_may_leave_while_its_gateway_is_gone() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        worker = gateway.worker(Role.ATTN)
        await worker.start(rejoin_timeout_s=600)
    await asyncio.sleep(0.3)
    worker.membership.report(MemberState.DRAINING)
    async with asyncio.timeout(5):
        await worker.stop()


async def test_a_gateway_of_another_layout_ends_the_worker_with_its_reason() -> None:
    async with SmallGateway(PARALLEL) as gateway:
        worker = gateway.worker(Role.EXPERT)
        await worker.start()
    wider = ParallelConfig(attn_devices=2, dp_size=1, expert_devices=2, ep_size=2)
    async with SmallGateway(wider).at(port_of(gateway)), asyncio.timeout(DEADLINE_S):
        with pytest.raises(UnavailableError, match=r"lost its place in the cluster: .*tp_size=1: "):
            await worker.membership.lost()
    await worker.stop()


def silence(worker: FakeWorker) -> None:
    """As if it were frozen: its lease thread ends, its stream stays."""
    registration = worker.membership._registration
    assert registration._lease is not None
    registration._lease.stop()


def failed(state: ClusterState, role: Role, rank: int) -> bool:
    return [(m.state, m.detail) for m in state.tier(role) if m.rank == rank] == [
        (MemberState.FAILED, NO_LEASE)
    ]


def member(state: ClusterState, role: Role, rank: int) -> Member:
    (found,) = (m for m in state.tier(role) if m.rank == rank)
    return found


async def test_a_frozen_member_is_shown_as_failed_and_comes_back_if_nobody_has_its_rank() -> None:
    async with SmallGateway(PARALLEL) as gateway, workers_of(gateway) as workers:
        before = member(gateway.registry.state, Role.EXPERT, 1)
        silence(workers[1])
        await workers[0].membership.wait_until(
            lambda state: failed(state, Role.EXPERT, 1), DEADLINE_S, "its failure"
        )
        thawed = cluster_pb2.LeaseRequest(
            role=role_to_pb(Role.EXPERT), rank=1, instance_epoch=before.instance_epoch
        )
        with pytest.raises(Exception, match="counts as lost"):
            await gateway.cluster_stub.Lease(thawed, timeout=5)
        state = await until(gateway, "whole again", ready)
        assert member(state, Role.EXPERT, 1).instance_epoch == before.instance_epoch


async def test_a_zombie_whose_rank_is_taken_is_refused_and_ends() -> None:
    async with SmallGateway(PARALLEL) as gateway, workers_of(gateway) as workers:
        zombie = workers[1]
        silence(zombie)
        await until(gateway, "failed", lambda state: failed(state, Role.EXPERT, 1))
        successor = await gateway.add_worker(Role.EXPERT, rank=1)
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(UnavailableError, match=r"lost its place .*rank=1: taken by pid"):
                await zombie.membership.lost()
        assert successor.membership.rank == 1
        assert ready(gateway.registry.state)


async def test_clients_watch_the_cluster_until_the_gateway_leaves() -> None:
    async with SmallGateway(PARALLEL) as gateway, EpserveClient(gateway.address) as client:
        states = client.watch_cluster()
        async with asyncio.timeout(DEADLINE_S):
            assert len((await anext(states)).members) == 1
            await gateway.add_worker(Role.ATTN)
            while len((await anext(states)).members) == 1:
                pass
            gateway.registry.versions.close()
            assert [state async for state in states][1:] == []


async def test_workers_go_from_a_lost_gateway_to_the_next() -> None:
    async with SmallGateway(PARALLEL) as first, SmallGateway(PARALLEL) as second:
        worker = FakeWorker(f"{first.address},{second.address}", FINGERPRINT, Role.ATTN, 1)
        await worker.start()
        try:
            await until(first, "joined", lambda state: state.tier(Role.ATTN))
            joined = identities(first.registry.state)
            first.cluster.close()
            await until(second, "joined", lambda state: state.tier(Role.ATTN))
            assert identities(second.registry.state) == joined
        finally:
            await worker.stop()


async def test_follower_refuses_workers_and_shows_what_the_leader_knows() -> None:
    leadership = Followed()
    async with SmallGateway(PARALLEL) as leader, SmallGateway(PARALLEL) as follower:
        follower.cluster._leadership = leadership
        record = GatewayRecord(leader.registry.gateway, leader.address)
        following = Following(record, follower.address, follower.registry, None)
        addresses = f"{follower.address},{leader.address}"
        worker = FakeWorker(addresses, FINGERPRINT, Role.ATTN, 1)
        await worker.start()
        try:
            state = await until(follower, "told", lambda state: state.tier(Role.ATTN))
            assert identities(state) == identities(leader.registry.state)
            assert following.is_heard
            with pytest.raises(UnavailableError, match="registering processes is for another"):
                await follower.worker(Role.EXPERT).start(join_timeout_s=0.2)
            leader.cluster.end_registrations()
            leader.cluster._leadership = leadership
            async with asyncio.timeout(DEADLINE_S):
                while following.is_heard:
                    await asyncio.sleep(0.01)
            assert follower.registry.state.tier(Role.ATTN)  # until somebody knows better
        finally:
            await worker.stop()
            await following.close()


class Followed(SoleGateway):
    """Another gateway leads."""

    leads = False

    def require(self, what: str) -> None:
        raise UnavailableError(f"{what} is for another gateway")
