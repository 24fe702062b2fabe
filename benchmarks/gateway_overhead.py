"""What the gateway adds: time to the first token, and its CPU for each token that it streams.

    python benchmarks/gateway_overhead.py [--model DIR]

A real `epserve gateway` process in front of benchmarks/paced_attention.py, which answers at once
and then at a fixed pace. The same requests go straight to it and through the gateway, by gRPC and
by HTTP, 32 at a time, in turns; and to benchmarks/bare_streams.py, which only passes tokens on.
Prints a table, and one JSON line, for each way.
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
CONCURRENCY, PROMPT_TOKENS, NUM_TOKENS, STEP_S = 32, 128, 128, 0.02
TICKS = os.sysconf("SC_CLK_TCK")
Arrived = Callable[[int], None]
Send = Callable[[list[int], Arrived], Awaitable[None]]


def straight(group: Group, pool: AttentionPool) -> Send:
    """To the attention tier, as the gateway itself speaks to it."""
    numbers = count()

    async def send(prompt: list[int], arrived: Arrived) -> None:
        sequence = Sequence(
            f"straight {next(numbers)}",
            tuple(prompt),
            NUM_TOKENS,
            0.0,
            1.0,
            0,
            0.0,
            1,
            (),
            0,
            (),
            0,
        )
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
        self._arrived(len(delta.token_ids))
        if delta.finish_reason:
            self.ended.set_result(None)

    def fail(self, error: Exception) -> None:
        self.ended.set_exception(error)


def through_grpc(client: EpserveClient) -> Send:
    sampling = Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)

    async def send(prompt: list[int], arrived: Arrived) -> None:
        async for output in client.generate(prompt, sampling):
            arrived(len(output.token_ids))

    return send


def through_http(port: int) -> Send:
    """A client that reads no more of a stream than its first and its last event."""

    async def send(prompt: list[int], arrived: Arrived) -> None:
        fields = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps({"prompt": prompt, **fields})
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        async for line in reader:
            if line.startswith(b"data: ["):
                arrived(NUM_TOKENS)  # some of them had no text, and so no event
                break
            if line.startswith(b"data: "):
                arrived(0)
        writer.close()

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

            def arrived(num: int) -> None:
                nonlocal first, num_tokens
                first = first or time.perf_counter()
                num_tokens += num

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
async def bare_servers(engine: str) -> AsyncIterator[dict[str, tuple[int, Send]]]:
    """In front of the same attention tier."""
    command = [sys.executable, str(HERE / "bare_streams.py"), "--engine", engine]
    process = subprocess.Popen(  # noqa: ASYNC220
        [*command, "--num", str(NUM_TOKENS)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        ports = json.loads(process.stdout.readline())
        async with EpserveClient(f"127.0.0.1:{ports['grpc']}") as client:
            yield {
                "bare grpc": (process.pid, through_grpc(client)),
                "bare http": (process.pid, through_http(ports["http"])),
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


@asynccontextmanager
async def paced_cluster(model: Path) -> AsyncIterator[tuple[int, EpserveClient, int, Group]]:
    """The gateway's pid, a client of it, its HTTP port, and the group behind it."""
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
        yield process.pid, client, http_port, Group(0, leader, leader.attention_load)


async def measure(model: Path, rounds: int, window_s: float) -> None:
    """All ways take turns, so that a slow minute of the machine is everybody's."""
    async with AsyncExitStack() as stack:
        pid, client, http_port, group = await stack.enter_async_context(paced_cluster(model))
        bare = await stack.enter_async_context(bare_servers(group.leader.address))
        pool = AttentionPool()
        straight_send = straight(group, pool)
        ways = {"grpc": (pid, through_grpc(client)), "http": (pid, through_http(http_port)), **bare}
        idle: dict[str, float] = {}
        for name, (process, send) in ways.items():
            await load(send, 1.0)
            before = cpu_s(process)
            await asyncio.sleep(3.0)
            idle[name] = (cpu_s(process) - before) / 3.0
        added: dict[str, list[float]] = {name: [] for name in ways}
        per_token: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            direct, _ = await load(straight_send, window_s)
            for name, (process, send) in ways.items():
                before, since = cpu_s(process), time.perf_counter()
                firsts, num_tokens = await load(send, window_s)
                used = cpu_s(process) - before - idle[name] * (time.perf_counter() - since)
                added[name].append(1000 * (statistics.median(firsts) - statistics.median(direct)))
                per_token[name].append(1e6 * used / num_tokens)
        for name in ways:
            report(name, idle[name], added[name], per_token[name])
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
