"""A process that is stopped in mid-request: it is noticed, and what can go on does."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from attn_service.cluster_upkeep import TICK_S
from epserve.client import EpserveClient
from epserve.generate_messages import Output, Sampling
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.errors import UnavailableError
from support.processes import serving
from support.served_cluster import DEADLINE_S, connected

NOTICED_S = 4.0  # 3 are promised, and the machine may be busy
LAYOUT = ("--attn-devices", "2", "--dp-size", "2", "--dtype", "float64")
PROMPT = (5, 6, 7)
LONG = Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with serving(*LAYOUT) as (_, target):
        yield target


def state_of(target: str) -> ClusterState:
    with connected(target) as cluster:
        return cluster.state


def stop(target: str, role: Role, rank: int) -> Member:
    (member,) = (each for each in state_of(target).tier(role) if each.rank == rank)
    os.kill(member.pid, signal.SIGSTOP)
    return member


async def begun(client: EpserveClient) -> AsyncIterator[Output]:
    """A request whose first tokens have come."""
    outputs = client.generate(PROMPT, LONG)
    await anext(outputs)
    return outputs


async def all_tokens(client: EpserveClient, begun: asyncio.Semaphore) -> list[int]:
    """`begun` is released when the first come."""
    found: list[int] = []
    async for output in client.generate(PROMPT, LONG):
        if not found:
            begun.release()
        found += output.token_ids
    return found


def num_held(target: str) -> list[tuple[int, int]]:
    """Of each attention process: sequences that it has, and KV blocks that are not free."""
    loads = [member.attention_load for member in state_of(target).tier(Role.ATTN)]
    return [
        (load.num_running + load.num_waiting, load.total_kv_blocks - load.free_kv_blocks)
        for load in loads
        if load is not None
    ]


async def test_requests_of_a_frozen_process_go_on_elsewhere_and_it_comes_back_when_it_thaws(
    target: str,
) -> None:
    async with EpserveClient(target) as client:
        begun = asyncio.Semaphore(0)
        quiet = await all_tokens(client, begun)
        await begun.acquire()
        both = [asyncio.create_task(all_tokens(client, begun)) for _ in range(2)]  # one on each
        for _ in both:
            await begun.acquire()
        frozen = stop(target, Role.ATTN, 1)
        try:
            async with asyncio.timeout(NOTICED_S):
                while len(state_of(target).tier(Role.ATTN)) == 2:
                    await asyncio.sleep(0.1)
            assert await asyncio.gather(*both) == [quiet] * 2
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
    async with asyncio.timeout(DEADLINE_S):
        while not is_back(frozen, target):
            await asyncio.sleep(0.1)
        await asyncio.sleep(2 * TICK_S)  # until it has seen that its links are lost
        while not is_back(frozen, target):
            await asyncio.sleep(0.1)
        # What it was stopped at is wanted by nobody: it is dropped, and its tokens went nowhere.
        while num_held(target) != [(0, 0)] * 2:
            await asyncio.sleep(0.1)
    async with EpserveClient(target) as client:
        requests = (all_tokens(client, begun) for _ in range(4))
        assert await asyncio.gather(*requests) == [quiet] * 4


def is_back(frozen: Member, target: str) -> bool:
    """As the same start of the same process, and ready."""
    return any(
        (m.pid, m.instance_epoch, m.state) == (frozen.pid, frozen.instance_epoch, MemberState.READY)
        for m in state_of(target).tier(Role.ATTN)
    )


async def test_a_client_notices_a_frozen_gateway(target: str) -> None:
    async with EpserveClient(target) as client:
        outputs = await begun(client)
        stop(target, Role.GATEWAY, 0)
        async with asyncio.timeout(NOTICED_S):
            with pytest.raises(UnavailableError, match="ping timeout"):
                _ = [output async for output in outputs]
