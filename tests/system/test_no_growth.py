"""Ten thousand requests leave a cluster as it was: its memory, descriptors, threads and tasks."""

import asyncio
import random

import psutil
import pytest

from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from moe_core.cluster import Role
from support.processes import serving

WARM, REQUESTS, AT_ONCE = 2_000, 10_000, 64
# In bfloat16, on CPUs that have it, oneDNN keeps code for each number of rows that it has met, for
# 1,024 of them (200 MiB); that is no request's.
LAYOUT = ("--dtype", "float64", "--kv-cache-tokens", "8192")
# Allocators keep arenas and reports come and go, so not quite nothing: under 2 KiB a request.
MOST_BYTES = 16 * 2**20
MOST_DESCRIPTORS = 4
TOLD_S = 3.0  # tasks are told of with the leases, every second


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


async def _sizes(client: EpserveClient) -> dict[str, tuple[int, int, int, int]]:
    """Resident bytes, descriptors, threads and tasks by process, once the last have been told."""
    await asyncio.sleep(TOLD_S)
    found = {}
    for member in (await client.cluster()).members:
        process = psutil.Process(member.pid)
        rss, tasks = process.memory_info().rss, member.loop_tasks
        assert tasks
        size = rss, process.num_fds(), process.num_threads(), tasks
        found[f"{member.role} {member.rank}"] = size
    return found


@pytest.mark.timeout(480)
async def test_ten_thousand_requests_leave_nothing_behind():
    with serving(*LAYOUT) as (_, target):
        async with EpserveClient(target) as client:
            await _traffic(client, WARM, seed=1)
            before = await _sizes(client)
            assert await _traffic(client, REQUESTS, seed=2) > REQUESTS
            after = await _sizes(client)
            (attention,) = (await client.cluster()).tier(Role.ATTN)
    load = attention.attention_load
    assert load is not None
    assert (load.num_running, load.num_waiting) == (0, 0)
    assert load.free_kv_blocks == load.total_kv_blocks
    for name, (rss, descriptors, threads, tasks) in after.items():
        rss_before, descriptors_before, threads_before, tasks_before = before[name]
        grown = f"{name}: {before[name]} before, {after[name]} after"
        assert rss - rss_before < MOST_BYTES, grown
        assert descriptors - descriptors_before <= MOST_DESCRIPTORS, grown
        assert threads - threads_before <= MOST_DESCRIPTORS, grown
        assert tasks - tasks_before <= MOST_DESCRIPTORS, grown
