"""Requests that wait in the gateway: shares, refusals and ways out, over real gRPC."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
import pytest

from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from gateway import requests
from gateway.callers import Caller
from gateway.entrance import QueueLimits
from moe_core.cluster import Role
from moe_core.errors import TooManyRequestsError
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from support.fake_attention import FakeAttention
from support.small_gateway import SmallGateway

DEADLINE_S = 10
SEATS = 3  # of max_num_seqs 2
MAX_QUEUED = 4


def count_up(prompt: Sequence[int]) -> list[int]:
    return [prompt[-1] + step for step in range(1, 6)]


@pytest.fixture
async def gateway() -> AsyncIterator[SmallGateway]:
    async with SmallGateway(limits=QueueLimits(max_requests=MAX_QUEUED)) as gateway:
        yield gateway


def message(request_id: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(request_id=request_id, token_ids=pb.TokenIds(ids=(5, 6)))


def send(gateway: SmallGateway, request_id: str) -> asyncio.Task[list[Any]]:
    async def collect() -> list[Any]:
        return [answer async for answer in gateway.stub.Generate(message(request_id), timeout=60)]

    return asyncio.create_task(collect())


async def until_queued(gateway: SmallGateway, count: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while gateway.registry.queued_requests != count:
            await asyncio.sleep(0.002)


async def fill(gateway: SmallGateway, queued: int) -> list[asyncio.Task[list[Any]]]:
    """So many requests that all seats are taken and `queued` wait, the last of them last."""
    calls = []
    for index in range(SEATS + queued):
        calls.append(send(gateway, f"r{index}"))
        async with asyncio.timeout(DEADLINE_S):
            while f"r{index}" not in gateway.generator.under_way:
                await asyncio.sleep(0.002)
    await until_queued(gateway, queued)
    return calls


async def end(calls: list[asyncio.Task[list[Any]]]) -> None:
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)


async def test_equal_keys_get_equal_tokens_while_one_floods() -> None:
    async with SmallGateway() as gateway:
        fake = FakeAttention(count_up, step_s=0.001)
        await gateway.add_worker(Role.ATTN, fake, max_num_seqs=4)
        served: Counter[str] = Counter()

        async def again_and_again(caller: Caller, prompt: tuple[int, ...]) -> None:
            while sum(served.values()) < 3_000:
                asked = requests.GenerationRequest(
                    "", "", prompt, requests.Sampling(max_tokens=5), caller=caller
                )
                async for chunk in gateway.generator.generate(asked):
                    tokens = len(chunk.token_ids) + (len(prompt) if chunk.finish_reason else 0)
                    if sum(served.values()) < 3_000:
                        served[caller.name] += tokens

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(100):
                group.create_task(again_and_again(Caller("flooding"), (5, 6) * 10))
            for _ in range(10):
                group.create_task(again_and_again(Caller("modest"), (5, 6)))
        shares = served.values()
        assert sum(shares) ** 2 / (2 * sum(share**2 for share in shares)) >= 0.95


async def test_full_queue_is_refused_with_the_time_to_come_back(gateway: SmallGateway) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up, step_s=60), max_num_seqs=2)
    calls = await fill(gateway, MAX_QUEUED)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(gateway, "one too many")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"queue full: {MAX_QUEUED} requests wait" in caught.value.details()
    assert dict(caught.value.trailing_metadata())["retry-after"] == "1"
    async with EpserveClient(gateway.address) as client:
        with pytest.raises(TooManyRequestsError) as told:
            _ = [output async for output in client.generate((5, 6), Sampling(max_tokens=2))]
        assert told.value.retry_after_s == 1
        assert (await client.cluster()).members[0].queued_requests == MAX_QUEUED
    await end(calls)


async def test_cancelled_while_it_waits_it_leaves_the_queue(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up, step_s=60)
    await gateway.add_worker(Role.ATTN, fake, max_num_seqs=2)
    calls = await fill(gateway, 2)
    calls[-1].cancel()
    await until_queued(gateway, 1)
    assert len(fake.added) == SEATS
    assert "r4" not in gateway.generator.under_way
    await end(calls)
    await until_queued(gateway, 0)


async def test_past_its_deadline_it_leaves_the_queue(gateway: SmallGateway) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up, step_s=60), max_num_seqs=2)
    calls = await fill(gateway, 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [answer async for answer in gateway.stub.Generate(message("late"), timeout=0.1)]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until_queued(gateway, 1)
    await end(calls)


async def test_aborted_while_it_waits_it_ends_with_no_token(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up, step_s=60)
    await gateway.add_worker(Role.ATTN, fake, max_num_seqs=2)
    calls = await fill(gateway, 1)
    assert (await gateway.stub.Abort(pb.AbortRequest(request_id="r3"), timeout=5)).found
    (answer,) = await calls[-1]
    assert (answer.finish_reason, list(answer.token_ids)) == ("abort", [])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 0)
    assert len(fake.added) == SEATS
    await end(calls)


async def test_draining_serves_who_waits(gateway: SmallGateway) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up, step_s=0.05), max_num_seqs=2)
    calls = await fill(gateway, 2)
    async with asyncio.timeout(DEADLINE_S):
        await gateway.generator.drain()
    assert [(await call)[-1].finish_reason for call in calls] == ["length"] * len(calls)


async def test_a_drain_that_is_cut_short_refuses_who_waits(gateway: SmallGateway) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up, step_s=60), max_num_seqs=2)
    calls = await fill(gateway, 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await gateway.generator.drain()
    gateway.generator.close()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await calls[-1]
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await end(calls[:-1])


async def test_a_lost_tier_refuses_who_waits(gateway: SmallGateway) -> None:
    worker = await gateway.add_worker(Role.ATTN, FakeAttention(count_up, step_s=60), max_num_seqs=2)
    calls = await fill(gateway, 2)
    await worker.stop()
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_keys_requests_at_a_time_are_limited(gateway: SmallGateway) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up, step_s=0.05))
    caller = Caller("one", max_concurrent_requests=1)
    asked = requests.GenerationRequest("", "", (5, 6), requests.Sampling(), caller=caller)
    first = gateway.generator.generate(asked)
    await anext(first)
    with pytest.raises(TooManyRequestsError, match="max_concurrent_requests is 1"):
        await anext(gateway.generator.generate(asked))
    await first.aclose()
    assert [chunk async for chunk in gateway.generator.generate(asked)]
