"""An attention group leaves under streams, which go on elsewhere with what it has computed."""

import asyncio
from dataclasses import replace

import pytest

from epserve.admin_client import AdminClient
from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from moe_core.cluster import ClusterState, Role
from support.processes import serving

STREAMS = 6
DEADLINE_S = 120.0
MAX_TOKENS = 160
PROMPT = tuple(range(5, 45))  # behind a token of its own for each stream
BASE = (
    *("--dp-size", "2", "--expert-devices", "1", "--dtype", "float64"),
    *("--kv-cache-tokens", "8192", "--max-num-seqs", "16"),
)


def sampling_of(stream: int) -> Sampling:
    """Greedy and drawn, with penalties, with logprobs, and with two choices."""
    settings = Sampling(max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=1)
    if stream % 3 == 0:
        return replace(settings, temperature=0.0)
    if stream % 3 == 1:
        return replace(settings, temperature=1.0, seed=stream, n=2)
    return replace(
        settings, temperature=1.0, seed=stream, repetition_penalty=1.2, frequency_penalty=0.3
    )


async def tokens(
    client: EpserveClient, stream: int, begun: asyncio.Semaphore
) -> list[list[tuple[int, float]]]:
    """Of each choice, tokens and their logprobs; `begun` is released at the 8th of the first."""
    sampling = sampling_of(stream)
    found: list[list[tuple[int, float]]] = [[] for _ in range(sampling.n or 1)]
    async for output in client.generate((50 + stream, *PROMPT), sampling):
        told = [round(each.logprob, 9) for each in output.logprobs]
        before = len(found[0])
        found[output.index].extend(zip(output.token_ids, told, strict=True))
        if before < 8 <= len(found[0]):
            begun.release()
    return found


async def left_under_streams(target: str, tp_size: int) -> ClusterState:
    """The state after the second group has left; all streams were as they are undisturbed."""
    async with EpserveClient(target) as client, AdminClient(target) as admin:
        begun = asyncio.Semaphore(0)
        streams = [asyncio.create_task(tokens(client, each, begun)) for each in range(STREAMS)]
        for _ in streams:
            await begun.acquire()
        phases = [each async for each in admin.scale(attn_devices=tp_size)]
        assert phases[-1].done
        found = await asyncio.gather(*streams)
        # Not before: what a group has cached need not be handed over.
        assert found == [await tokens(client, each, begun) for each in range(STREAMS)]
        while len((await client.cluster()).tier(Role.ATTN)) > tp_size:
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)  # a report
        return await client.cluster()


@pytest.mark.parametrize(("transport", "tp_size"), [("nixl", 1), ("grpc", 1), ("nixl", 2)])
def test_no_token_is_computed_twice_when_a_group_leaves(transport: str, tp_size: int) -> None:
    devices = ("--attn-devices", str(2 * tp_size), "--transport", transport)
    with serving(*BASE, *devices) as (_, target):

        async def run() -> ClusterState:
            async with asyncio.timeout(DEADLINE_S):
                return await left_under_streams(target, tp_size)

        state = asyncio.run(run())
    metrics = state.tier(Role.ATTN)[0].engine_metrics
    assert metrics is not None
    assert metrics.recomputed_tokens == 0
    # Half of the streams, or nearly, were on the group that has left.
    assert metrics.handed_over_tokens > 2 * len(PROMPT)
