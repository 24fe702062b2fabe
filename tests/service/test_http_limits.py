"""What HTTP clients are told when the queue is full or their key has used up what it may."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

import httpx2
import pytest

from gateway.callers import ANONYMOUS, Caller
from gateway.entrance import QueueLimits
from moe_core.cluster import Role
from support.fake_attention import FakeAttention
from support.http_gateway import http_side
from support.small_gateway import SmallGateway
from support.words import WORDS, word_tokenizer

DEADLINE_S = 10
SEATS = 3  # of max_num_seqs 2
MAX_QUEUED = 2
ROUTES = ("/v1/completions", "/v1/chat/completions")
BODY = {"prompt": [5, 6], "max_tokens": 5}


def count_up(prompt: Sequence[int]) -> list[int]:
    return [prompt[-1] + step for step in range(1, 6)]


@pytest.fixture
async def gateway() -> AsyncIterator[SmallGateway]:
    limits = QueueLimits(max_requests=MAX_QUEUED)
    async with SmallGateway(tokenizer=word_tokenizer(), limits=limits) as gateway:
        yield gateway


@pytest.fixture
async def full(gateway: SmallGateway) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a gateway whose queue is full."""
    slow = FakeAttention(count_up, step_s=60)
    await gateway.add_worker(Role.ATTN, slow, max_num_seqs=2)
    async with http_side(gateway) as client:
        calls = [
            asyncio.create_task(client.post(ROUTES[0], json=BODY, timeout=60))
            for _ in range(SEATS + MAX_QUEUED)
        ]
        async with asyncio.timeout(DEADLINE_S):
            while gateway.registry.queued_requests < MAX_QUEUED:
                await asyncio.sleep(0.002)
        yield client
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)


def retry_after(response: httpx2.Response, words: str) -> int:
    """Of a response that refuses with these words."""
    error = response.json()["error"]
    assert response.status_code == 429, error
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert words in error["message"]
    return int(response.headers["retry-after"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
async def test_a_full_queue_is_429_with_the_time_to_come_back(
    full: httpx2.AsyncClient, path: str, stream: bool
) -> None:
    response = await full.post(path, json={**BODY, "stream": stream})
    assert retry_after(response, f"queue full: {MAX_QUEUED} requests wait") == 1
    assert (await full.get("/health")).status_code == 200


async def test_what_a_full_queue_refuses_is_not_read(full: httpx2.AsyncClient) -> None:
    """A body of 8 MB is only announced."""
    where = urlsplit(str(full.base_url))
    head = f"POST {ROUTES[0]} HTTP/1.1\r\nhost: here\r\ncontent-length: 8000000\r\n\r\n"
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    async with asyncio.timeout(DEADLINE_S):
        writer.write(head.encode() + b'{"prompt": [')
        assert (await reader.readline()).startswith(b"HTTP/1.1 429 ")
    writer.close()
    await writer.wait_closed()


async def test_a_keys_requests_at_a_time_are_limited(gateway: SmallGateway) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up, step_s=0.1))
    caller = Caller("one", max_concurrent_requests=1)
    async with http_side(gateway, authenticate=lambda _: caller) as client:
        async with client.stream("POST", ROUTES[0], json={**BODY, "stream": True}) as first:
            assert first.status_code == 200
            for stream in (False, True):
                refused = await client.post(ROUTES[0], json={**BODY, "stream": stream})
                assert retry_after(refused, "max_concurrent_requests is 1") == 1
            assert (await first.aread()).endswith(b"data: [DONE]\n\n")
        assert (await client.post(ROUTES[0], json=BODY)).status_code == 200


async def test_a_keys_tokens_a_minute_are_limited(gateway: SmallGateway) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    caller = Caller("one", max_tokens_per_minute=10)
    async with http_side(gateway, authenticate=lambda _: caller) as client:
        assert (await client.post(ROUTES[0], json=BODY)).status_code == 200
        for stream in (False, True):
            refused = await client.post(ROUTES[0], json={**BODY, "stream": stream})
            seconds = retry_after(refused, "3 tokens are left of max_tokens_per_minute=10")
            assert 20 < seconds <= 24
        never = await client.post(ROUTES[0], json={**BODY, "max_tokens": 9})
        assert (never.status_code, never.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize(
    "caller", [ANONYMOUS, Caller("one"), Caller("two", max_concurrent_requests=1)]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_of_one_body_do_not_refuse_each_other(
    gateway: SmallGateway, caller: Caller, stream: bool
) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up), max_num_seqs=1)
    prompts = [[5 + number, 6 + number] for number in range(20)]
    async with http_side(gateway, authenticate=lambda _: caller) as client:
        body = {**BODY, "prompt": prompts, "stream": stream}
        response = await client.post(ROUTES[0], json=body)
    assert response.status_code == 200
    if stream:
        assert response.text.count('"finish_reason":"length"') == 20
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        texts = [choice["text"] for choice in response.json()["choices"]]
        assert texts == [" ".join(WORDS[last + 1 : last + 6]) for _, last in prompts]


async def test_prompts_that_never_fit_into_a_keys_tokens_together_are_400(
    gateway: SmallGateway,
) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    caller = Caller("one", max_tokens_per_minute=20)
    async with http_side(gateway, authenticate=lambda _: caller) as client:
        never = await client.post(ROUTES[0], json={**BODY, "prompt": [[5], [6], [7], [8]]})
        assert never.status_code == 400
        assert "make 24 tokens" in never.json()["error"]["message"]
        assert (
            await client.post(ROUTES[0], json={**BODY, "prompt": [[5], [6], [7]]})
        ).status_code == 200
