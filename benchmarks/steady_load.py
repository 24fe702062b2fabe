"""The same request three ways, and 32 of them under way at all times.

Knows what each way's request looks like, and counts the tokens that come back. Knows nothing of
who answers them, nor of what that costs.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import grpc.aio

from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from gateway.engine_messages import add_to_pb
from gateway.requests import Sequence
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1.attention_pb2_grpc import AttentionServiceStub

CONCURRENCY, PROMPT_TOKENS, STEP_S = 32, 128, 0.02
PROMPTS = [
    [2 + (row + column) % 500 for column in range(PROMPT_TOKENS)] for row in range(CONCURRENCY)
]
Arrived = Callable[[], None]
Send = Callable[[list[int], Arrived], Awaitable[None]]
"""One request, from its sending to its last token; Arrived is called for each token."""


def straight(channel: grpc.aio.Channel, num_tokens: int) -> Send:
    """To the attention tier, a call for each request as through the gateway."""
    stub: Any = AttentionServiceStub(channel)
    numbers = count()

    async def send(prompt: list[int], arrived: Arrived) -> None:
        name = f"straight {next(numbers)}"
        sequence = Sequence(name, tuple(prompt), num_tokens, 0.0, 1.0, 0, 0.0, 1, (), 0, (), 0)
        call = stub.Serve()
        await call.write(pb.EngineRequest(add=add_to_pb(sequence, False)))
        await call.done_writing()
        async for step in call:
            for _ in step.outputs:
                arrived()

    return send


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


@dataclass
class Load:
    """firsts_s: to the first token of each request that has ended."""

    num_tokens: int = 0
    firsts_s: list[float] = field(default_factory=list)

    async def one(self, send: Send, prompt: list[int]) -> None:
        sent, first = time.perf_counter(), 0.0

        def arrived() -> None:
            nonlocal first
            first = first or time.perf_counter()
            self.num_tokens += 1

        await send(prompt, arrived)
        self.firsts_s.append(first - sent)


@asynccontextmanager
async def steady_load(send: Send, num_tokens: int) -> AsyncIterator[Load]:
    """CONCURRENCY streams at all times, spread over their answers."""
    load = Load()
    more = True

    async def again_and_again(row: int) -> None:
        await asyncio.sleep(row * num_tokens * STEP_S / CONCURRENCY)
        while more:
            await load.one(send, PROMPTS[row])

    async with asyncio.TaskGroup() as group:
        for row in range(CONCURRENCY):
            group.create_task(again_and_again(row))
        await asyncio.sleep(num_tokens * STEP_S + 0.5)
        yield load
        more = False
