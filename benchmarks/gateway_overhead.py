"""What the gateway adds: time to the first token, and CPU for each token that it streams.

    python benchmarks/gateway_overhead.py [--model DIR]

A real `epserve gateway` process in front of benchmarks/paced_attention.py, which answers at once
and then at a fixed pace. The same requests go straight to it and through the gateway, by gRPC and
by HTTP, in turns; and to benchmarks/bare_streams.py, which only passes tokens on. 32 streams run
all the while that is measured, one ending and one beginning at a time.

CPU is a process's, of all its threads, less what it uses when idle. What a way adds is its front's
and the tier's, less the tier's where requests go straight to it: there the tier writes a message
for each token, and behind a gateway one for each step. Prints a table, and one JSON line, for each
way.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from child import Child
from epserve.client import EpserveClient
from epserve.local_cluster import wait_ready
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import Role
from moe_core.config.parallel import ParallelConfig
from moe_core.service.grpc_channel import open_channel
from steady_load import (
    CONCURRENCY,
    PROMPTS,
    STEP_S,
    Send,
    steady_load,
    straight,
    through_grpc,
    through_http,
)

TINY = Path(__file__).parents[1] / "epserve" / "tiny_model"
TICKS = os.sysconf("SC_CLK_TCK")
STRAIGHT = "straight"


@dataclass(frozen=True)
class Way:
    """How requests go, and by whom: the process in front of the tier, if any."""

    name: str
    send: Send
    front_pid: int | None


@dataclass
class Measured:
    """One list entry for each round: milliseconds in the median, and µs of CPU for each token."""

    ttft_ms: list[float] = field(default_factory=list)
    front_us: list[float] = field(default_factory=list)
    tier_us: list[float] = field(default_factory=list)


def cpu_s(pid: int | None) -> float:
    """Of all threads of a process, user and system, since it began."""
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def free_ports() -> tuple[int, int]:
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return probe.getsockname()[1], other.getsockname()[1]


@asynccontextmanager
async def ways_to_tokens(model: Path, num_tokens: int) -> AsyncIterator[tuple[int, list[Way]]]:
    """The tier's process, and all ways to it."""
    grpc_port, http_port = free_ports()
    target = f"127.0.0.1:{grpc_port}"
    ports = ["--grpc-port", str(grpc_port), "--port", str(http_port)]
    command = [sys.executable, "-m", "epserve", "gateway", "--model", str(model), *ports]
    async with AsyncExitStack() as stack:
        gateway = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        stack.callback(gateway.wait, 30)
        stack.callback(gateway.terminate)
        step = ["--step", str(STEP_S)]
        tier = Child("paced_attention.py", "--gateway", target, "--model", str(model), *step)
        stack.callback(tier.close)
        client = await stack.enter_async_context(EpserveClient(target))
        parallel = ParallelConfig().with_model(Checkpoint.open(model).config)
        (leader,) = (await wait_ready(client, parallel, 60)).tier(Role.ATTN)
        wanted = ["--engine", leader.address, "--num", str(num_tokens)]
        bare = Child("bare_streams.py", *wanted)
        stack.callback(bare.close)
        bare_client = EpserveClient(f"127.0.0.1:{bare.ready['grpc']}")
        await stack.enter_async_context(bare_client)
        channel = await stack.enter_async_context(open_channel(leader.address))
        yield (
            tier.pid,
            [
                Way(STRAIGHT, straight(channel, num_tokens), None),
                Way("grpc", through_grpc(client, num_tokens), gateway.pid),
                Way("http", through_http(http_port, num_tokens), gateway.pid),
                Way("bare grpc", through_grpc(bare_client, num_tokens), bare.pid),
                Way("bare http", through_http(bare.ready["http"], num_tokens), bare.pid),
            ],
        )


async def idle_share(pid: int | None) -> float:
    """Of a core, that a process uses while nothing is asked of it."""
    before = cpu_s(pid)
    await asyncio.sleep(3.0)
    return (cpu_s(pid) - before) / 3.0


async def measure(model: Path, rounds: int, window_s: float, num_tokens: int) -> None:
    """All ways take turns, so that a slow minute of the machine is everybody's."""
    async with ways_to_tokens(model, num_tokens) as (tier_pid, ways):
        for way in ways:
            await way.send(PROMPTS[0], lambda: None)
        idle = {pid: await idle_share(pid) for pid in {tier_pid, *(way.front_pid for way in ways)}}
        measured = {way.name: Measured() for way in ways}
        for _ in range(rounds):
            for way in ways:
                pids = (way.front_pid, tier_pid)
                async with steady_load(way.send, num_tokens) as load:
                    tokens, since = load.num_tokens, time.perf_counter()
                    before = [cpu_s(pid) for pid in pids]
                    await asyncio.sleep(window_s)
                    took, tokens = time.perf_counter() - since, load.num_tokens - tokens
                    used = [cpu_s(pid) - idle[pid] * took for pid in pids]
                front, tier = (
                    1e6 * (now - then) / tokens for now, then in zip(used, before, strict=True)
                )
                measured[way.name].ttft_ms.append(1000 * statistics.median(load.firsts_s))
                measured[way.name].front_us.append(front)
                measured[way.name].tier_us.append(tier)
    for name, result in measured.items():
        report(name, result, measured[STRAIGHT])


def report(name: str, way: Measured, direct: Measured) -> None:
    rounds = zip(way.front_us, way.tier_us, direct.tier_us, strict=True)
    rows = {
        "added_ttft_ms": [a - b for a, b in zip(way.ttft_ms, direct.ttft_ms, strict=True)],
        "added_cpu_us_per_token": [front + tier - alone for front, tier, alone in rounds],
        "front_cpu_us_per_token": way.front_us,
        "tier_cpu_us_per_token": way.tier_us,
    }
    result: dict[str, object] = {"way": name, "concurrency": CONCURRENCY}
    for row, values in rows.items():
        result[row] = [round(each, 2) for each in values]
        result[f"median_{row}"] = round(statistics.median(values), 2)
    for key, value in result.items():
        print(f"{key:30} {value}")
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=float, default=8.0, help="seconds of each measurement")
    parser.add_argument("--num-tokens", type=int, default=128, help="of each answer")
    options = parser.parse_args()
    model, num_tokens = options.model.absolute(), options.num_tokens
    asyncio.run(measure(model, options.rounds, options.window, num_tokens))


if __name__ == "__main__":
    main()
