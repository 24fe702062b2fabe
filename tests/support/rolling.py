"""A cluster of single processes, each of a release of choice, that are replaced one after the other
while streams run. Knows how one is replaced and what every stream must be; which, and when, the
tests say.
"""

import asyncio
import signal
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from attn_service.cluster_upkeep import TICK_S
from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from epserve.local_cluster import wait_ready
from epserve.resuming import generate_resuming
from moe_core.cluster import Role
from moe_core.config.parallel import ParallelConfig
from support.processes import TINY_MODEL, Running, started

PARALLEL = ParallelConfig(attn_devices=2, dp_size=2, expert_devices=2, ep_size=2)
TIERS = (
    *("--attn-devices", "2", "--dp-size", "2"),
    *("--expert-devices", "2", "--ep-size", "2", "--expert-parallel-degree", "2"),
    *("--num-redundant-experts", "16"),  # every expert is on both
)
SETTINGS = ("--device", "cpu", "--dtype", "float64", "--threads", "1")
STREAMS = 4
READY_S = 120.0
RESUME_S = 120.0  # a gateway takes seconds to start, more where all share two cores
DRAINED_S = 60.0


class RollingCluster:
    """A gateway, two attention groups and two expert processes that each hold every expert.

    releases: the sources that each process runs, by name; None: this checkout's."""

    def __init__(self, stack: ExitStack, tree: Path | None) -> None:
        self._stack = stack
        self._port = _free_port()
        self.target = f"127.0.0.1:{self._port}"
        self._processes: dict[str, Running] = {}
        for name in ("gateway 0", "expert 0", "expert 1", "attn 0", "attn 1"):
            self._start(name, tree)

    def replace(self, name: str, tree: Path | None) -> None:
        """Ask a process to drain and to end, and start its successor under the same name."""
        former = self._processes[name]
        former.send(signal.SIGTERM)
        assert former.wait(DRAINED_S) == 0, former
        self._start(name, tree)

    async def settled(self, client: EpserveClient) -> None:
        """All are ready, and have been for long enough to have met each other."""
        while True:
            await wait_ready(client, PARALLEL, READY_S)
            await asyncio.sleep(2 * TICK_S)
            state = await wait_ready(client, PARALLEL, READY_S)
            if not any(member.detail for member in state.tier(Role.ATTN)):
                return

    def _start(self, name: str, tree: Path | None) -> None:
        role, _, rank = name.partition(" ")
        model = ("--model", str(TINY_MODEL))
        if role == "gateway":
            options = (*TIERS, "--grpc-port", str(self._port), "--port", "0")
        else:
            options = ("--gateway", self.target, *SETTINGS, "--rank", rank)
        if role == "attn":
            options += ("--kv-cache-tokens", "2048", "--expert-wait", "30")
        process = started(role, *model, *options, tree=tree)
        self._processes[name] = self._stack.enter_context(process)


async def roll(cluster: RollingCluster, names: Sequence[str], tree: Path | None) -> None:
    """Replace these processes by such of `tree` while every stream goes on, again and again, each
    time with exactly the tokens that it had before; in every mix each at least once."""
    async with EpserveClient(cluster.target) as client:
        await cluster.settled(client)
        load = _Load(client, [await _tokens(client, each) for each in range(STREAMS)])
        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(load.run(each)) for each in range(STREAMS)]
            for name in names:
                await asyncio.to_thread(cluster.replace, name, tree)
                await cluster.settled(client)
                await load.rounds(2)
            for stream in streams:
                stream.cancel()


class _Load:
    def __init__(self, client: EpserveClient, quiet: list[list[int]]) -> None:
        self._client = client
        self._quiet = quiet
        self._done = [0] * STREAMS

    async def run(self, stream: int) -> None:
        """Until cancelled, or until a request ends otherwise than undisturbed."""
        while True:
            assert await _tokens(self._client, stream) == self._quiet[stream]
            self._done[stream] += 1

    async def rounds(self, count: int) -> None:
        """Until every stream has ended so many requests from now."""
        wanted = [done + count for done in self._done]
        async with asyncio.timeout(READY_S):
            while any(done < want for done, want in zip(self._done, wanted, strict=True)):
                await asyncio.sleep(0.1)


async def _tokens(client: EpserveClient, stream: int) -> list[int]:
    """Half of the streams are greedy, half are drawn."""
    temperature = 0.0 if stream % 2 else 1.0
    sampling = Sampling(max_tokens=40, ignore_eos=True, temperature=temperature, seed=stream)
    prompt = (5, 6, 7 + stream)
    outputs = generate_resuming([client], prompt, sampling, resume_s=RESUME_S)
    found = [token async for output in outputs for token in output.token_ids]
    assert len(found) == 40
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
