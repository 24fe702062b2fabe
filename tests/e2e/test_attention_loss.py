"""Attention processes that are killed or told to stop under streams, which go on unharmed.

The processes are started one by one, so that nobody stops the others when one ends.
"""

import asyncio
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from epserve.local_cluster import wait_ready
from moe_core.cluster import Role
from moe_core.config.parallel import ParallelConfig
from support.processes import TINY_MODEL, Running, started

PARALLEL = ParallelConfig(attn_devices=2, dp_size=2)
STREAMS = 64
READY_S = 60.0
SETTINGS = Sampling(max_tokens=48, ignore_eos=True, logprobs=0, n=1)


class Processes:
    """Of one cluster; `attention` by rank."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        model = ("--model", str(TINY_MODEL))
        ports = ("--grpc-port", "0", "--port", "0")
        tiers = ("--attn-devices", "2", "--dp-size", "2")
        gateway = stack.enter_context(started("gateway", *model, *ports, *tiers))
        found = re.search(r"address='([^']+)'", gateway.wait_for("listening"))
        assert found is not None
        self.target = found[1]
        self._worker = (
            *(*model, "--gateway", self.target),
            *("--device", "cpu", "--dtype", "float64", "--threads", "1"),
        )
        stack.enter_context(started("expert", *self._worker))
        self.attention = [self._start(rank) for rank in range(2)]

    def start_again(self, rank: int) -> None:
        self.attention[rank] = self._start(rank)

    def _start(self, rank: int) -> Running:
        return self._stack.enter_context(started("attn", *self._worker, "--rank", str(rank)))


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with ExitStack() as stack:
        yield Processes(stack)


def sampling_of(stream: int) -> Sampling:
    """Half of them greedy, half drawn."""
    if stream % 2:
        return replace(SETTINGS, temperature=0.0)
    return replace(SETTINGS, temperature=1.0, seed=stream, repetition_penalty=1.1)


async def tokens(client: EpserveClient, stream: int, begun: asyncio.Semaphore) -> list[int]:
    """Of one stream, which must end as it should; `begun` is released at its 8th token."""
    found: list[int] = []
    outputs = client.generate((5, 6, 7 + stream), sampling_of(stream))
    async for output in outputs:
        assert [each.token_id for each in output.logprobs] == list(output.token_ids)
        for token in output.token_ids:
            found.append(token)
            if len(found) == 8:
                begun.release()
    assert output.finish_reason == "length"
    assert output.usage is not None
    assert (output.usage.prompt_tokens, output.usage.completion_tokens) == (3, 48)
    return found


async def all_streams(
    client: EpserveClient, process: Running | None = None, number: int = 0
) -> list[list[int]]:
    """The tokens of all streams; when all have begun, `process` gets a signal."""
    begun = asyncio.Semaphore(0)
    streams = [asyncio.create_task(tokens(client, each, begun)) for each in range(STREAMS)]
    for _ in streams:
        await asyncio.wait_for(begun.acquire(), READY_S)
    if process is not None:
        process.send(signal.Signals(number))
    return list(await asyncio.gather(*streams))


async def moved_tokens(
    client: EpserveClient, more_than: tuple[int, int] = (-1, -1)
) -> tuple[int, int]:
    """Handed over to the process of rank 0, and computed again there, once either has grown."""
    async with asyncio.timeout(READY_S):
        while True:
            metrics = (await client.cluster()).tier(Role.ATTN)[0].engine_metrics
            if metrics is not None:
                found = metrics.handed_over_tokens, metrics.recomputed_tokens
                if found[0] > more_than[0] or found[1] > more_than[1]:
                    return found
            await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(processes: Processes) -> list[list[int]]:
    async def run() -> list[list[int]]:
        async with EpserveClient(processes.target) as client:
            await wait_ready(client, PARALLEL, READY_S)
            return await all_streams(client)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)]
)
async def test_every_stream_of_a_stopped_attention_process_ends_with_its_own_tokens(
    processes: Processes, undisturbed: list[list[int]], number: signal.Signals, status: int
) -> None:
    async with EpserveClient(processes.target) as client:
        await wait_ready(client, PARALLEL, READY_S)
        before = await moved_tokens(client)
        assert await all_streams(client, processes.attention[1], number) == undisturbed
        if number is signal.SIGTERM:  # one that drains hands over what it has computed
            handed_over, recomputed = await moved_tokens(client, more_than=before)
            assert handed_over > before[0]
            assert recomputed == before[1]
    assert processes.attention[1].wait() == status
    processes.start_again(1)
