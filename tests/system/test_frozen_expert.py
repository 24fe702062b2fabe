"""An expert process that is stopped under load, and goes on later as if nothing had been."""

import asyncio
import os
import re
import signal
from collections.abc import Iterator

import pytest

from attn_service.cluster_upkeep import TICK_S
from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from moe_core.cluster import LinkStats, Member, MemberState, Role
from support.processes import Running, serving

NOTICED_S = 4.0  # 3 are promised, and the machine may be busy
BACK_S = 60.0
STREAMS = 4
LAYOUT = (
    *("--expert-devices", "2", "--ep-size", "2", "--expert-parallel-degree", "2"),
    *("--num-redundant-experts", "16", "--dtype", "float64", "--kv-cache-tokens", "4096"),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Running, str]]:
    with serving(*LAYOUT) as (serve, target):
        yield serve, target


async def tokens(client: EpserveClient, stream: int, begun: asyncio.Semaphore) -> list[int]:
    """`begun` is released when the first come."""
    sampling = Sampling(max_tokens=200, ignore_eos=True, temperature=stream % 2, seed=stream)
    found: list[int] = []
    async for output in client.generate((5, 6, 7 + stream), sampling):
        if not found:
            begun.release()
        found += output.token_ids
    return found


async def expert(client: EpserveClient, rank: int) -> Member | None:
    tier = (await client.cluster()).tier(Role.EXPERT)
    return next((member for member in tier if member.rank == rank), None)


async def link(client: EpserveClient, rank: int) -> LinkStats:
    (attention,) = (await client.cluster()).tier(Role.ATTN)
    (found,) = (each for each in attention.links if each.target == f"expert {rank}")
    return found


async def is_back(client: EpserveClient, frozen: Member) -> bool:
    """As the same start of the same process, with a link to it."""
    (attention,) = (await client.cluster()).tier(Role.ATTN)
    now = await expert(client, frozen.rank)
    return not attention.detail and now is not None and is_ready(now) and is_same(now, frozen)


def is_ready(member: Member | None) -> bool:
    return member is not None and member.state is MemberState.READY


def is_same(one: Member, other: Member) -> bool:
    return (one.pid, one.instance_epoch) == (other.pid, other.instance_epoch)


async def test_others_go_on_without_it_and_what_it_says_late_is_not_taken(
    cluster: tuple[Running, str],
) -> None:
    serve, target = cluster
    async with EpserveClient(target) as client:

        async def all_streams(begun: asyncio.Semaphore) -> list[list[int]]:
            return await asyncio.gather(*(tokens(client, each, begun) for each in range(STREAMS)))

        quiet = await all_streams(asyncio.Semaphore(0))
        begun = asyncio.Semaphore(0)
        disturbed = asyncio.create_task(all_streams(begun))
        for _ in range(STREAMS):
            await begun.acquire()
        frozen = await expert(client, 1)
        assert frozen is not None
        before = await link(client, 1)
        os.kill(frozen.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(NOTICED_S):
                while is_ready(await expert(client, 1)):
                    await asyncio.sleep(0.1)
            assert await disturbed == quiet
            assert await all_streams(begun) == quiet
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
        await until_back(client, frozen)
        line = await asyncio.to_thread(serve.wait_for, "a link is replaced")
        late = re.search(r"late_answers=(\d+)", line)
        assert late is not None, line
        assert await all_streams(begun) == quiet
        after = await link(client, 1)
        assert before.transport == after.transport
        assert after.dispatches > 0  # of the new link: it is asked again


async def until_back(client: EpserveClient, frozen: Member) -> None:
    async with asyncio.timeout(BACK_S):
        for _ in range(2):  # and still so once all have seen what they have lost
            while not await is_back(client, frozen):
                await asyncio.sleep(0.1)
            await asyncio.sleep(2 * TICK_S)
