"""Both tiers grow and shrink, and experts move, under streams that keep every token."""

import asyncio
import re
from collections.abc import Iterator

import pytest

from attn_service.cluster_upkeep import EXPERT_LOAD_S
from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from moe_core.cluster import Role
from support.processes import epserve, serving
from support.served_cluster import connected

LAYOUT = (
    *("--expert-devices", "2", "--ep-size", "2", "--expert-parallel-degree", "2"),
    *("--num-redundant-experts", "4", "--dtype", "float64", "--kv-cache-tokens", "4096"),
)
STREAMS = 4
DEADLINE_S = 150.0


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with serving(*LAYOUT) as (_, address):
        yield address


async def tokens(client: EpserveClient, stream: int) -> list[int]:
    sampling = Sampling(max_tokens=40, ignore_eos=True, temperature=1.0, seed=stream)
    outputs = client.generate((5, 6, 7 + stream), sampling)
    return [token async for output in outputs for token in output.token_ids]


async def change(target: str, *arguments: str) -> str:
    done = await asyncio.to_thread(epserve, *arguments, "--target", target, timeout_s=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def under_load(target: str, *arguments: str) -> str:
    """What a change prints that is made while streams come and go, each exactly as it was."""
    async with EpserveClient(target) as client, asyncio.timeout(DEADLINE_S):
        quiet = [await tokens(client, stream) for stream in range(STREAMS)]
        changing = asyncio.create_task(change(target, *arguments))
        rounds = 0
        while not changing.done() or rounds == 0:
            found = await asyncio.gather(*(tokens(client, each) for each in range(STREAMS)))
            assert found == quiet
            rounds += 1
        after = await asyncio.gather(*(tokens(client, each) for each in range(STREAMS)))
        assert after == quiet
        return await changing


@pytest.mark.parametrize("size", [4, 3, 2])
def test_expert_tier_changes_its_size_under_load(target: str, size: int) -> None:
    words = asyncio.run(under_load(target, "scale", "--experts", str(size)))
    assert words.splitlines()[-1] == f"done: 1 attention and {size} expert processes"
    with connected(target) as cluster:
        state = cluster.state
        assert [member.rank for member in state.tier(Role.EXPERT)] == [*range(size)]
        assert state.placement.ep_size == size


@pytest.mark.parametrize("size", [3, 1])
def test_attention_tier_changes_its_size_under_load(target: str, size: int) -> None:
    words = asyncio.run(under_load(target, "scale", "--attn", str(size)))
    assert words.splitlines()[-1] == f"done: {size} attention and 2 expert processes"


def test_experts_are_placed_anew_under_load(target: str) -> None:
    asyncio.run(skew(target))
    words = asyncio.run(under_load(target, "rebalance", "--force"))
    assert words.startswith("changed"), words
    before, after = re.findall(r"(\d\.\d+)(?: of the mean load| before)", words)[::-1]
    assert float(after) < float(before), words


async def skew(target: str) -> None:
    """Most tokens are one and the same, so that few experts have most of the load."""
    async with EpserveClient(target) as client:
        for first in range(6):
            prompt, sampling = (20 + first, *(7,) * 500), Sampling(max_tokens=1)
            _ = [output async for output in client.generate(prompt, sampling)]
    await asyncio.sleep(2 * EXPERT_LOAD_S)


def test_a_tier_that_is_sharded_alone_grows_by_a_whole_group_and_shrinks_again() -> None:
    """Level 0, whose experts are each on both processes, becomes Level 1."""
    layout = ("--expert-devices", "2", "--dtype", "float64", "--kv-cache-tokens", "4096")
    with serving(*layout) as (_, target):
        refused = epserve("scale", "--experts", "3", "--target", target)
        assert refused.returncode == 2
        assert "whole groups of 2" in refused.stderr
        for size, degree in ((4, 1), (2, 1)):
            words = asyncio.run(under_load(target, "scale", "--experts", str(size)))
            assert words.splitlines()[-1] == f"done: 1 attention and {size} expert processes"
            with connected(target) as cluster:
                parallel = cluster.state.parallel
            assert (parallel.ep_size, parallel.etp_size) == (size // 2, 2)
            assert parallel.degree == degree
