"""What the gateway adds: time to the first token, and its CPU for each token that it streams.

    python benchmarks/gateway_overhead.py [--model DIR]

A real `epserve gateway` process in front of benchmarks/paced_attention.py, which answers at once
and then at a fixed pace. The same requests go straight to it and through the gateway, by gRPC and
by HTTP, in turns; and to benchmarks/bare_streams.py, which only passes tokens on. 32 streams run
all the while that is measured, one ending and one beginning at a time. Prints a table, and one
JSON line, for each way.
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
from dataclasses import dataclass
from itertools import count
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))

from epserve.client import EpserveClient  # noqa: E402
from epserve.generate_messages import Sampling  # noqa: E402
from epserve.local_cluster import wait_ready  # noqa: E402
from gateway.attention_pool import AttentionPool  # noqa: E402
from gateway.groups import Group  # noqa: E402
from gateway.request_stream import Delta  # noqa: E402
from gateway.requests import Sequence  # noqa: E402
from gateway.tokenizer import TextTokenizer  # noqa: E402
from moe_core.checkpoint.checkpoint import Checkpoint  # noqa: E402
from moe_core.cluster import Role  # noqa: E402
from moe_core.config.parallel import ParallelConfig  # noqa: E402
from paced_attention import PacedAttention  # noqa: E402
from support.fake_attention import FakeWorker  # noqa: E402

TINY = HERE.parent / "epserve" / "tiny_model"
CONCURRENCY, PROMPT_TOKENS, STEP_S = 32, 128, 0.02
TICKS = os.sysconf("SC_CLK_TCK")
Arrived = Callable[[], None]
Send = Callable[[list[int], Arrived], Awaitable[None]]
"""One request, from its sending to its last token; Arrived is called for each token or event."""


def straight(group: Group, pool: AttentionPool, num_tokens: int) -> Send:
    """To the attention tier, as the gateway itself speaks to it."""
    numbers = count()

    async def send(prompt: list[int], arrived: Arrived) -> None:
        name = f"straight {next(numbers)}"
        sequence = Sequence(name, tuple(prompt), num_tokens, 0.0, 1.0, 0, 0.0, 1, (), 0, (), 0)
        arrivals = Arrivals(arrived)
        pool.submit(group, [sequence], arrivals)
        await arrivals.ended

    return send


class Arrivals:
    """A Taker of one choice."""

    def __init__(self, arrived: Arrived) -> None:
        self._arrived = arrived
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, index: int, delta: Delta) -> None:
        self._arrived()
        if delta.finish_reason:
            self.ended.set_result(None)

    def fail(self, error: Exception) -> None:
        self.ended.set_exception(error)


def through_grpc(client: EpserveClient, num_tokens: int) -> Send:
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)

    async def send(prompt: list[int], arrived: Arrived) -> None:
        async for _ in client.generate(prompt, sampling):
            arrived()

    return send


def through_http(port: int, num_tokens: int) -> Send:
    """A client that keeps its connections, as OpenAI's does, and reads of an event no more than
    that there is one."""
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    fields = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}

    async def send(prompt: list[int], arrived: Arrived) -> None:
        body = json.dumps({"prompt": prompt, **fields})
        while free and free[-1][0].at_eof():  # since the last time that it was this way's turn
            free.pop()[1].close()
        reader, writer = free.pop() if free else await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        async for line in reader:
            if line.startswith(b"data: ["):
                break
            if line.startswith(b"data: "):
                arrived()
        await reader.readuntil(b"\r\n0\r\n\r\n")
        free.append((reader, writer))

    return send


@asynccontextmanager
async def steady_load(send: Send, num_tokens: int) -> AsyncIterator[list[float]]:
    """CONCURRENCY streams at all times, spread over their answers. Gives the seconds to the first
    token of each request that has ended."""
    firsts: list[float] = []
    more = True

    async def one(prompt: list[int]) -> None:
        sent, first = time.perf_counter(), 0.0

        def arrived() -> None:
            nonlocal first
            first = first or time.perf_counter()

        await send(prompt, arrived)
        firsts.append(first - sent)

    async def again_and_again(row: int) -> None:
        await asyncio.sleep(row * num_tokens * STEP_S / CONCURRENCY)
        while more:
            await one([2 + (row + column) % 500 for column in range(PROMPT_TOKENS)])

    async with asyncio.TaskGroup() as group:
        for row in range(CONCURRENCY):
            group.create_task(again_and_again(row))
        await asyncio.sleep(num_tokens * STEP_S + 0.5)
        yield firsts
        more = False


def cpu_s(pid: int) -> float:
    """Of all threads of a process, user and system, since it began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@asynccontextmanager
async def bare_servers(engine: str, num_tokens: int) -> AsyncIterator[dict[str, tuple[int, Send]]]:
    """In front of the same attention tier."""
    command = [sys.executable, str(HERE / "bare_streams.py"), "--engine", engine]
    process = subprocess.Popen(  # noqa: ASYNC220
        [*command, "--num", str(num_tokens)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        ports = json.loads(process.stdout.readline())
        async with EpserveClient(f"127.0.0.1:{ports['grpc']}") as client:
            yield {
                "bare grpc": (process.pid, through_grpc(client, num_tokens)),
                "bare http": (process.pid, through_http(ports["http"], num_tokens)),
            }
    finally:
        process.terminate()
        process.wait(30)


def text_tokens(model: Path) -> list[int]:
    """Those with a text of their own, as nearly all tokens of a text are, so that each has its
    event; all of them where the tokenizer cannot say."""
    tokenizer = TextTokenizer.from_directory(model)
    assert tokenizer is not None, f"{model} has no tokenizer"
    ids = range(Checkpoint.open(model).config.vocab_size)
    return [each for each in ids if tokenizer.whole_text(each)] or list(ids)


@dataclass(frozen=True)
class PacedCluster:
    pid: int
    client: EpserveClient
    http_port: int
    group: Group
    engine: PacedAttention


@asynccontextmanager
async def paced_cluster(model: Path) -> AsyncIterator[PacedCluster]:
    """A gateway's process with a paced engine, which runs here, behind it."""
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{probe.getsockname()[1]}"
        http_port = other.getsockname()[1]
    ports = ["--grpc-port", target.rpartition(":")[2], "--port", str(http_port)]
    arguments = ["gateway", "--model", str(model), *ports]
    command = [sys.executable, "-m", "epserve", *arguments]
    checkpoint = Checkpoint.open(model)
    async with AsyncExitStack() as stack:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        engine = PacedAttention(STEP_S, text_tokens(model))
        for role, fake in ((Role.ATTN, engine), (Role.EXPERT, None)):
            worker = FakeWorker(target, checkpoint.fingerprint(), role)
            stack.push_async_callback(worker.stop)
            await worker.start(fake, total_kv_blocks=16_384, join_timeout_s=60)
        client = await stack.enter_async_context(EpserveClient(target))
        state = await wait_ready(client, ParallelConfig().with_model(checkpoint.config), 60)
        (leader,) = state.tier(Role.ATTN)
        assert leader.attention_load is not None
        group = Group(0, leader, leader.attention_load)
        yield PacedCluster(process.pid, client, http_port, group, engine)


async def idle_share(pid: int) -> float:
    """Of a core, that a process uses while nothing is asked of it."""
    before = cpu_s(pid)
    await asyncio.sleep(3.0)
    return (cpu_s(pid) - before) / 3.0


async def measure(model: Path, rounds: int, window_s: float, num_tokens: int) -> None:
    """All ways take turns, so that a slow minute of the machine is everybody's."""
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(paced_cluster(model))
        address = cluster.group.leader.address
        bare = await stack.enter_async_context(bare_servers(address, num_tokens))
        pool = AttentionPool()
        stack.push_async_callback(pool.close)
        straight_send = straight(cluster.group, pool, num_tokens)
        ways = {
            "grpc": (cluster.pid, through_grpc(cluster.client, num_tokens)),
            "http": (cluster.pid, through_http(cluster.http_port, num_tokens)),
            **bare,
        }
        idle: dict[str, float] = {}
        for name, (pid, send) in ways.items():
            await send([2] * PROMPT_TOKENS, lambda: None)
            idle[name] = await idle_share(pid)
        added: dict[str, list[float]] = {name: [] for name in ways}
        per_token: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            async with steady_load(straight_send, num_tokens) as direct:
                await asyncio.sleep(window_s)
            for name, (pid, send) in ways.items():
                async with steady_load(send, num_tokens) as firsts:
                    tokens, cpu, since = cluster.engine.num_tokens, cpu_s(pid), time.perf_counter()
                    await asyncio.sleep(window_s)
                    took = time.perf_counter() - since
                    used = cpu_s(pid) - cpu - idle[name] * took
                    tokens = cluster.engine.num_tokens - tokens
                added[name].append(1000 * (statistics.median(firsts) - statistics.median(direct)))
                per_token[name].append(1e6 * used / tokens)
        for name in ways:
            report(name, idle[name], added[name], per_token[name])


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
    parser.add_argument("--num-tokens", type=int, default=128, help="of each answer")
    options = parser.parse_args()
    model, num_tokens = options.model.absolute(), options.num_tokens
    asyncio.run(measure(model, options.rounds, options.window, num_tokens))


if __name__ == "__main__":
    main()
