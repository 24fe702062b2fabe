"""Two gateways that share a real etcd: one leads; either may be lost, and etcd for a while."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import pytest

from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from epserve.resuming import generate_resuming
from moe_core.cluster import ClusterState, Role
from moe_core.errors import EpserveError
from moe_core.service.addresses import bound_socket
from support.etcd import Etcd, running_etcd
from support.processes import TINY_MODEL, Running, epserve, started

MODEL = ("--model", str(TINY_MODEL))
LAYOUT = (
    *("--attn-devices", "2", "--dp-size", "2", "--expert-devices", "2", "--ep-size", "2"),
    *("--expert-parallel-degree", "2"),
)
STREAMS = 4
DEADLINE_S = 60.0
OUTAGE_S = 8.0  # over twice a gateway's lease
ELECTED_S = 15.0
FREED_S = 7.0  # 5 are promised, and loads are told every second


@dataclass(frozen=True)
class Cluster:
    etcd: Etcd
    gateways: Sequence[Running]
    targets: Sequence[str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        etcd = stack.enter_context(running_etcd())
        targets = [free_address(), free_address()]
        gateways = []
        for target in targets:
            ports = ("--grpc-port", target.rpartition(":")[2], "--port", "0")
            shared = ("--registry", etcd.registry)
            gateways.append(
                stack.enter_context(started("gateway", *MODEL, *LAYOUT, *ports, *shared))
            )
            gateways[-1].wait_for("event='leads'" if len(gateways) == 1 else "event='follows'")
        worker = (*MODEL, "--gateway", ",".join(targets), "--device", "cpu", "--dtype", "float64")
        for _ in range(2):
            stack.enter_context(started("expert", *worker, "--threads", "1"))
            cache = ("--threads", "1", "--kv-cache-tokens", "4096")
            stack.enter_context(started("attn", *worker, *cache))
        for gateway in gateways:
            gateway.wait_for("event='ready'")
        yield Cluster(etcd, gateways, targets)


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


@pytest.mark.parametrize("frozen", [True, False])
def test_etcd_that_is_away_for_a_while_costs_nobody_anything(
    cluster: Cluster, frozen: bool
) -> None:
    asyncio.run(_lose_etcd(cluster, frozen))


async def _lose_etcd(cluster: Cluster, frozen: bool) -> None:
    first, second = cluster.targets
    async with EpserveClient(first) as leader, EpserveClient(second) as follower:
        quiet = [await tokens(leader, stream) for stream in range(STREAMS)]
        before = starts(await leader.cluster())
        if frozen:
            cluster.etcd.send(signal.SIGSTOP)
        else:
            cluster.etcd.stop()
        over_at = time.monotonic() + OUTAGE_S
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


async def changed(target: str, *arguments: str) -> str:
    done = await asyncio.to_thread(epserve, *arguments, "--target", target, timeout_s=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
        assert not any(each.done() for each in resumed)
        cluster.gateways[0].send(signal.SIGKILL)
        with pytest.raises(EpserveError):
            await orphan
        assert await asyncio.gather(*resumed) == quiet
        state = await until(kept, lambda state: standing(state, second) == "leads", ELECTED_S)
        leads.set()
        assert await others >= 1
        await until(kept, _nothing_runs, FREED_S)
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
    long = Sampling(max_tokens=2000, ignore_eos=True, temperature=0.0)
    async for _ in client.generate((5, 6), long):
        pass


def _nothing_runs(state: ClusterState) -> bool:
    loads = [member.attention_load for member in state.tier(Role.ATTN)]
    return all(load is not None and load.num_running == 0 for load in loads)


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
