"""What the gateway adds: time to the first token, and its CPU for each token that it streams.

    python benchmarks/gateway_overhead.py [--model DIR]

A real `epserve gateway` process in front of benchmarks/paced_attention.py, which answers at once
and then at a fixed pace. The same requests go straight to it and through the gateway, 32 at a time,
in turns.
Prints a table, and one JSON line.
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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))

from epserve.client import EpserveClient, Sampling  # noqa: E402
from epserve.local_cluster import wait_ready  # noqa: E402
from gateway.attention_pool import AttentionPool  # noqa: E402
from gateway.balancer import Group  # noqa: E402
from gateway.requests import Sequence  # noqa: E402
from moe_core.checkpoint.checkpoint import Checkpoint  # noqa: E402
from moe_core.cluster import Role  # noqa: E402
from moe_core.config.parallel import ParallelConfig  # noqa: E402
from paced_attention import PacedAttention  # noqa: E402
from support.fake_attention import FakeWorker  # noqa: E402

TINY = HERE.parent / "epserve" / "tiny_model"
CONCURRENCY, PROMPT_TOKENS, NUM_TOKENS, STEP_S = 32, 128, 128, 0.02
TICKS = os.sysconf("SC_CLK_TCK")
Arrived = Callable[[int], None]
Send = Callable[[list[int], Arrived], Awaitable[None]]


def straight(group: Group, pool: AttentionPool) -> Send:
    """To the attention tier, as the gateway itself speaks to it."""

    async def send(prompt: list[int], arrived: Arrived) -> None:
        sequence = Sequence(
            "straight", tuple(prompt), NUM_TOKENS, 0.0, 1.0, 0, 0.0, 1, (), 0, (), 0
        )
        stream = pool.submit(group, [sequence])
        finish_reason = ""
        while not finish_reason:
            _, delta = await stream.next()
            finish_reason = delta.finish_reason
            arrived(len(delta.token_ids))

    return send


def through_grpc(client: EpserveClient) -> Send:
    sampling = Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)

    async def send(prompt: list[int], arrived: Arrived) -> None:
        async for output in client.generate(prompt, sampling):
            arrived(len(output.token_ids))

    return send


async def load(send: Send, window_s: float) -> tuple[list[float], int]:
    """Seconds to the first token of each request, and the number of tokens."""
    firsts: list[float] = []
    num_tokens = 0
    until = time.perf_counter() + window_s

    async def again_and_again(row: int) -> None:
        nonlocal num_tokens
        await asyncio.sleep(row * NUM_TOKENS * STEP_S / CONCURRENCY)  # not all at the same time
        while (sent := time.perf_counter()) < until:
            first = 0.0

            def arrived(count: int) -> None:
                nonlocal first, num_tokens
                first = first or time.perf_counter()
                num_tokens += count

            await send([2 + (row + column) % 500 for column in range(PROMPT_TOKENS)], arrived)
            firsts.append(first - sent)

    async with asyncio.TaskGroup() as group:
        for row in range(CONCURRENCY):
            group.create_task(again_and_again(row))
    return firsts, num_tokens


def cpu_s(pid: int) -> float:
    """Of all threads of a process, user and system, since it began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@asynccontextmanager
async def paced_cluster(model: Path) -> AsyncIterator[tuple[int, EpserveClient, Group]]:
    """The gateway's pid, a client of it, and the group behind it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = ["gateway", "--model", str(model), "--grpc-port", target.rpartition(":")[2]]
    command = [sys.executable, "-m", "epserve", *arguments]
    checkpoint = Checkpoint.open(model)
    async with AsyncExitStack() as stack:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        engine = PacedAttention(STEP_S, checkpoint.config.vocab_size)
        for role, fake in ((Role.ATTN, engine), (Role.EXPERT, None)):
            worker = FakeWorker(target, checkpoint.fingerprint(), role)
            stack.push_async_callback(worker.stop)
            await worker.start(fake, total_kv_blocks=16_384, join_timeout_s=60)
        client = await stack.enter_async_context(EpserveClient(target))
        state = await wait_ready(client, ParallelConfig().with_model(checkpoint.config), 60)
        (leader,) = state.tier(Role.ATTN)
        assert leader.attention_load is not None
        yield process.pid, client, Group(0, leader, leader.attention_load)


async def measure(model: Path, rounds: int, window_s: float) -> None:
    async with paced_cluster(model) as (pid, client, group):
        pool = AttentionPool()
        straight_send, ways = straight(group, pool), {"grpc": through_grpc(client)}
        await load(through_grpc(client), 2.0)
        before = cpu_s(pid)
        await asyncio.sleep(5.0)
        idle = (cpu_s(pid) - before) / 5.0
        for name, send in ways.items():
            added, per_token = [], []
            for _ in range(rounds):
                direct, _ = await load(straight_send, window_s)
                before, since = cpu_s(pid), time.perf_counter()
                firsts, num_tokens = await load(send, window_s)
                used = cpu_s(pid) - before - idle * (time.perf_counter() - since)
                added.append(1000 * (statistics.median(firsts) - statistics.median(direct)))
                per_token.append(1e6 * used / num_tokens)
            report(name, idle, added, per_token)
        await pool.close()


def report(name: str, idle: float, added_ms: list[float], per_token_us: list[float]) -> None:
    result = {
        "way": name,
        "concurrency": CONCURRENCY,
        "gateway_idle_share_of_a_core": round(idle, 4),
        "added_ttft_ms": [round(each, 2) for each in added_ms],
        "cpu_us_per_token": [round(each, 1) for each in per_token_us],
        "median_added_ttft_ms": round(statistics.median(added_ms), 2),
        "median_cpu_us_per_token": round(statistics.median(per_token_us), 1),
    }
    for key, value in result.items():
        print(f"{key:30} {value}")
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=float, default=8.0, help="seconds of each measurement")
    options = parser.parse_args()
    asyncio.run(measure(options.model.absolute(), options.rounds, options.window))


if __name__ == "__main__":
    main()
