"""Ten thousand requests leave a cluster as it was: its memory, its descriptors, its threads."""

import asyncio
import random

import psutil
import pytest

from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from moe_core.cluster import Role
from support.processes import serving

WARM, REQUESTS, AT_ONCE = 2_000, 10_000, 64
# Allocators keep arenas and reports come and go, so not quite nothing: under 2 KiB a request.
MOST_BYTES = 16 * 2**20
MOST_DESCRIPTORS = 4


async def _traffic(client: EpserveClient, count: int, seed: int) -> int:
    """So many requests, of which a few are given up midway; the tokens that came."""
    drawn = random.Random(seed)
    numbers = iter(range(count))
    received = 0

    async def client_task() -> None:
        nonlocal received
        for _ in numbers:
            length, most = drawn.randint(1, 24), drawn.randint(1, 4)
            prompt = [drawn.randrange(3, 500) for _ in range(length)]
            sampling = Sampling(max_tokens=most, seed=drawn.randrange(2**32), ignore_eos=True)
            gives_up = drawn.random() < 0.05
            async for output in client.generate(prompt, sampling):
                received += len(output.token_ids)
                if gives_up:
                    break

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(client_task())
    return received


def _sizes(pids: dict[str, int]) -> dict[str, tuple[int, int, int]]:
    """Resident bytes, descriptors and threads by process."""
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    return {
        name: (process.memory_info().rss, process.num_fds(), process.num_threads())
        for name, process in processes.items()
    }


@pytest.mark.timeout(480)
async def test_ten_thousand_requests_leave_nothing_behind():
    with serving("--kv-cache-tokens", "8192") as (_, target):
        async with EpserveClient(target) as client:
            await _traffic(client, WARM, seed=1)
            members = (await client.cluster()).members
            pids = {f"{member.role} {member.rank}": member.pid for member in members}
            before = _sizes(pids)
            assert await _traffic(client, REQUESTS, seed=2) > REQUESTS
            await asyncio.sleep(2)  # the last reports
            (attention,) = (await client.cluster()).tier(Role.ATTN)
            after = _sizes(pids)
    load = attention.attention_load
    assert load is not None
    assert (load.num_running, load.num_waiting) == (0, 0)
    assert load.free_kv_blocks == load.total_kv_blocks
    for name, (rss, descriptors, threads) in after.items():
        rss_before, descriptors_before, threads_before = before[name]
        grown = f"{name}: {before[name]} before, {after[name]} after"
        assert rss - rss_before < MOST_BYTES, grown
        assert descriptors - descriptors_before <= MOST_DESCRIPTORS, grown
        assert threads - threads_before <= MOST_DESCRIPTORS, grown
