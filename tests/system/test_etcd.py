"""Two gateways that share a real etcd: one leads; either may be lost, and etcd for a while."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass

import pytest

from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from epserve.resuming import generate_resuming
from moe_core.cluster import ClusterState, Role
from moe_core.errors import UnavailableError
from moe_core.service.addresses import bound_socket
from support.etcd import Etcd, running_etcd
from support.processes import TINY_MODEL, Running, epserve, started

MODEL = ("--model", str(TINY_MODEL))
LAYOUT = (
    *("--attn-devices", "2", "--dp-size", "2", "--expert-devices", "2", "--ep-size", "2"),
    *("--expert-parallel-degree", "2"),
)
NUMBERS = ("--device", "cpu", "--dtype", "float64", "--threads", "1")
STREAMS = 4
DEADLINE_S = 60.0
PAUSE_S = 8.0  # over twice a gateway's lease
OUTAGE_S = 60.0
ELECTED_S = 15.0
FREED_S = 7.0  # 5 are promised, and loads are told every second
ENDED_S = 30.0
ABANDONED_TOKENS = 900  # nearly what the context holds
ABANDONED = 8  # so that their end is far off


@dataclass(frozen=True)
class Cluster:
    etcd: Etcd
    gateways: Sequence[Running]
    targets: Sequence[str]

    @property
    def shared(self) -> tuple[str, ...]:
        """Of every gateway."""
        return (*MODEL, *LAYOUT, "--registry", self.etcd.registry, "--port", "0")

    @property
    def expert(self) -> tuple[str, ...]:
        """Of every expert process."""
        return (*MODEL, "--gateway", ",".join(self.targets), *NUMBERS)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        etcd = stack.enter_context(running_etcd())
        gateways: list[Running] = []
        cluster = Cluster(etcd, gateways, [free_address(), free_address()])
        for target in cluster.targets:
            gateways.append(stack.enter_context(gateway_at(target, cluster)))
            gateways[-1].wait_for("event='leads'" if len(gateways) == 1 else "event='follows'")
        for _ in range(2):
            stack.enter_context(started("expert", *cluster.expert))
            stack.enter_context(started("attn", *cluster.expert, "--kv-cache-tokens", "4096"))
        for gateway in gateways:
            gateway.wait_for("event='ready'")
        yield cluster


def gateway_at(target: str, cluster: Cluster) -> AbstractContextManager[Running]:
    return started("gateway", *cluster.shared, "--grpc-port", target.rpartition(":")[2])


def free_address() -> str:
    with closing(bound_socket("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def sampling(stream: int) -> Sampling:
    return Sampling(max_tokens=60, ignore_eos=True, temperature=1.0, seed=stream)


async def tokens(client: EpserveClient, stream: int) -> list[int]:
    outputs = client.generate((5, 6, 7 + stream), sampling(stream))
    return [token async for output in outputs for token in output.token_ids]


async def rounds(client: EpserveClient, quiet: list[list[int]], enough: Callable[[], bool]) -> int:
    """So many times all streams ran, each exactly as it did before."""
    count = 0
    while count == 0 or not enough():
        found = await asyncio.gather(*(tokens(client, each) for each in range(STREAMS)))
        assert found == quiet
        count += 1
    return count


async def until(
    client: EpserveClient, true: Callable[[ClusterState], bool], timeout_s: float
) -> ClusterState:
    async with asyncio.timeout(timeout_s):
        while not true(state := await client.cluster()):
            await asyncio.sleep(0.1)
        return state


def starts(state: ClusterState) -> list[int]:
    workers = (member for member in state.members if member.role is not Role.GATEWAY)
    return sorted(member.instance_epoch for member in workers)


def standing(state: ClusterState, target: str) -> str:
    return next(member.detail for member in state.members if member.address == target)


def test_each_gateway_knows_all_and_only_one_changes_them(cluster: Cluster) -> None:
    first, second = cluster.targets

    async def ask() -> tuple[ClusterState, ClusterState, list[list[int]]]:
        async with EpserveClient(first) as one, EpserveClient(second) as other:
            found = [await tokens(client, 0) for client in (one, other)]
            return await one.cluster(), await other.cluster(), found

    one, other, found = asyncio.run(ask())
    assert found[0] == found[1]
    assert starts(one) == starts(other)
    for state in (one, other):
        assert [m.address for m in state.tier(Role.GATEWAY)] == [first, second]
    assert (standing(one, first), standing(other, second)) == ("leads", "follows gateway 0")
    refused = epserve("rebalance", "--target", second)
    assert refused.returncode == 1
    assert f"rebalancing is for the leading gateway, gateway 0 at {first}" in refused.stderr


def test_etcd_that_hangs_for_a_while_costs_nobody_anything(cluster: Cluster) -> None:
    asyncio.run(_lose_etcd(cluster, frozen=True, outage_s=PAUSE_S))


@pytest.mark.timeout(300)
def test_a_minute_without_etcd_costs_nothing_but_changes_of_the_members(cluster: Cluster) -> None:
    asyncio.run(_lose_etcd(cluster, frozen=False, outage_s=OUTAGE_S))
    asyncio.run(_grow_and_shrink(cluster))


async def _lose_etcd(cluster: Cluster, *, frozen: bool, outage_s: float) -> None:
    first, second = cluster.targets
    async with EpserveClient(first) as leader, EpserveClient(second) as follower:
        quiet = [await tokens(leader, stream) for stream in range(STREAMS)]
        before = starts(await leader.cluster())
        if frozen:
            cluster.etcd.send(signal.SIGSTOP)
        else:
            cluster.etcd.stop()
        over_at = time.monotonic() + outage_s
        await asyncio.gather(
            *(
                rounds(client, quiet, lambda: time.monotonic() > over_at)
                for client in (leader, follower)
            )
        )
        for client in (leader, follower):
            state = await client.cluster()
            assert "the registry is unreachable" in standing(state, client.target)
            assert starts(state) == before
        with pytest.raises(AssertionError, match="cannot be reached"):
            await changed(first, "scale", "--experts", "1")
        for target in cluster.targets:  # who comes anew is served as well
            async with EpserveClient(target) as client:
                await rounds(client, quiet, lambda: True)
        if frozen:
            cluster.etcd.send(signal.SIGCONT)
        else:
            await asyncio.to_thread(cluster.etcd.start)
        for client in (leader, follower):
            state = await until(
                client, lambda state: "unreachable" not in str(state.tier(Role.GATEWAY)), 20
            )
            assert starts(state) == before
        assert standing(await leader.cluster(), first) == "leads"
        await changed(first, "rebalance", "--force")
        await rounds(follower, quiet, lambda: True)


async def _grow_and_shrink(cluster: Cluster) -> None:
    """By an expert process that comes and goes, under streams at both gateways."""
    first, second = cluster.targets
    async with EpserveClient(first) as leader, EpserveClient(second) as follower:
        quiet = [await tokens(leader, stream) for stream in range(STREAMS)]
        before = starts(await leader.cluster())
        changing = asyncio.create_task(_third_expert(cluster, leader, follower, before))
        streams = [rounds(client, quiet, changing.done) for client in (leader, follower)]
        await asyncio.gather(*streams)
        await changing
        for client in (leader, follower):
            await until(client, lambda state: starts(state) == before, ELECTED_S)


async def _third_expert(
    cluster: Cluster, leader: EpserveClient, follower: EpserveClient, before: list[int]
) -> None:
    growing = asyncio.create_task(changed(leader.target, "scale", "--experts", "3"))
    await until(leader, lambda state: state.target is not None, DEADLINE_S)
    with started("expert", *cluster.expert) as third:
        assert (await growing).splitlines()[-1].endswith("3 expert processes")
        for client in (leader, follower):
            state = await until(client, lambda state: state.placement.ep_size == 3, ELECTED_S)
            assert len(starts(state)) == len(before) + 1
        await changed(leader.target, "scale", "--experts", "2")
        assert await asyncio.to_thread(third.wait, ENDED_S) == 0


async def changed(target: str, *arguments: str) -> str:
    done = await asyncio.to_thread(epserve, *arguments, "--target", target, timeout_s=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sequences_of_a_killed_gateway_that_nobody_resumes_are_freed_in_time(
    cluster: Cluster,
) -> None:
    asyncio.run(_orphan(cluster))


async def _orphan(cluster: Cluster) -> None:
    """By a gateway that comes for this alone: the one that leads is to see it."""
    target = free_address()
    with gateway_at(target, cluster) as third:
        third.wait_for("event='ready'")
        async with EpserveClient(target) as lost, EpserveClient(cluster.targets[0]) as leader:
            before = _output_tokens(await leader.cluster())
            orphans = [asyncio.create_task(_abandoned(lost)) for _ in range(ABANDONED)]
            await until(leader, lambda state: _num_running(state) == ABANDONED, DEADLINE_S)
            third.send(signal.SIGKILL)
            state = await until(leader, lambda state: _num_running(state) == 0, FREED_S)
            ends = await asyncio.gather(*orphans, return_exceptions=True)
    assert all(isinstance(end, UnavailableError) for end in ends), ends
    loads = [member.attention_load for member in state.tier(Role.ATTN)]
    assert all(load and load.free_kv_blocks == load.total_kv_blocks for load in loads)
    # None of them came to its end.
    assert 0 < _output_tokens(state) - before < ABANDONED * ABANDONED_TOKENS


def _output_tokens(state: ClusterState) -> int:
    found = [member.engine_metrics for member in state.tier(Role.ATTN)]
    return sum(metrics.output_tokens for metrics in found if metrics is not None)


def test_killed_leader_costs_no_stream_and_another_leads(cluster: Cluster) -> None:
    asyncio.run(_lose_leader(cluster))


async def _lose_leader(cluster: Cluster) -> None:
    first, second = cluster.targets
    async with EpserveClient(first) as lost, EpserveClient(second) as kept:
        quiet = [await tokens(kept, stream) for stream in range(STREAMS)]
        before = await kept.cluster()
        leads = asyncio.Event()
        others = asyncio.create_task(rounds(kept, quiet, leads.is_set))
        resumed = [asyncio.create_task(_resuming(lost, kept, each)) for each in range(STREAMS)]
        orphan = asyncio.create_task(_abandoned(lost))
        await asyncio.sleep(0.3)
        assert not any(each.done() for each in (*resumed, orphan))
        cluster.gateways[0].send(signal.SIGKILL)
        with pytest.raises(UnavailableError):
            await orphan
        assert await asyncio.gather(*resumed) == quiet
        state = await until(kept, lambda state: standing(state, second) == "leads", ELECTED_S)
        leads.set()
        assert await others >= 1
        await until(kept, lambda state: _num_running(state) == 0, FREED_S)
        assert starts(state) == starts(before)
        words = await _once_registered(second, "scale", "--experts", "1")
        assert words.splitlines()[-1] == "done: 2 attention and 1 expert processes"
        after = await kept.cluster()
        assert after.placement.epoch > before.placement.epoch
        assert after.placement.ep_size == 1
        await rounds(kept, quiet, lambda: True)


async def _resuming(first: EpserveClient, second: EpserveClient, stream: int) -> list[int]:
    outputs = generate_resuming(
        (first, second), (5, 6, 7 + stream), sampling(stream), resume_s=20.0
    )
    return [token async for output in outputs for token in output.token_ids]


async def _abandoned(client: EpserveClient) -> None:
    """A client that never resumes."""
    long = Sampling(max_tokens=ABANDONED_TOKENS, ignore_eos=True, temperature=0.0)
    async for _ in client.generate((5, 6), long):
        pass


def _num_running(state: ClusterState) -> int:
    loads = [member.attention_load for member in state.tier(Role.ATTN)]
    return sum(load.num_running for load in loads if load is not None)


async def _once_registered(target: str, *arguments: str) -> str:
    """As `changed`, once all members have come to the new leader."""
    deadline = time.monotonic() + ELECTED_S
    while True:
        try:
            return await changed(target, *arguments)
        except AssertionError as error:
            if "have yet to register" not in str(error) or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)
