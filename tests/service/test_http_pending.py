"""A connection on which a request waits for the answer before it, and what becomes of both."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import httpx2
import pytest

from moe_core.cluster import Role
from support.fake_attention import FakeAttention
from support.http_gateway import http_side, opened
from support.small_gateway import SmallGateway
from support.words import word_tokenizer

LONG = [2 + index % 60 for index in range(400)]


@pytest.fixture
def fake() -> FakeAttention:
    """Forty seconds of tokens after [5], one after anything else."""
    return FakeAttention(lambda prompt: LONG if prompt[0] == 5 else [7], step_s=0.1)


@pytest.fixture
async def client(fake: FakeAttention) -> AsyncIterator[httpx2.AsyncClient]:
    async with SmallGateway(tokenizer=word_tokenizer()) as gateway, http_side(gateway) as client:
        await gateway.add_worker(Role.ATTN, fake)
        yield client


def completion(token: int, *, stream: bool) -> bytes:
    body = json.dumps({"prompt": [token], "stream": stream})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return (head + body).encode()


async def until_added(fake: FakeAttention) -> None:
    async with asyncio.timeout(5):
        while not fake.added:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_generation_though_another_request_waits(
    client: httpx2.AsyncClient,
    fake: FakeAttention,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    async with opened(client) as (_, writer):
        writer.write(completion(5, stream=stream))
        await until_added(fake)
        writer.write(completion(6, stream=stream))
        await asyncio.sleep(0.25)
    async with asyncio.timeout(3):
        await fake.wait_for_abort()
    assert fake.aborted == [fake.added[0].sequence_id]
    assert len(fake.added) == 1
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []


async def test_a_request_that_waits_is_answered_next(
    client: httpx2.AsyncClient, fake: FakeAttention
) -> None:
    fake.step_s = 0.001
    answer = b""
    async with asyncio.timeout(20), opened(client) as (reader, writer):
        writer.write(completion(5, stream=True) + completion(6, stream=True) * 2)
        while answer.count(b"[DONE]") < 3:
            answer += await reader.read(65_536)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert [each.prompt_ids[0] for each in fake.added] == [5, 6, 6]


async def test_what_is_no_request_does_not_end_up_within_the_answer_before_it(
    client: httpx2.AsyncClient, fake: FakeAttention
) -> None:
    async with asyncio.timeout(5), opened(client) as (reader, writer):
        writer.write(completion(5, stream=True))
        begun = await reader.readuntil(b"data: ")
        writer.write(b"\x00 this is no HTTP\r\n\r\n")
        rest = await reader.read()
        await fake.wait_for_abort()
    assert b"HTTP/1.1 200 OK" in begun
    assert b"HTTP/1.1" not in rest
    assert b"[DONE]" not in rest


async def test_what_is_no_request_is_refused_where_nothing_is_being_answered(
    client: httpx2.AsyncClient,
) -> None:
    async with asyncio.timeout(3), opened(client) as (reader, writer):
        writer.write(b"\x00 this is no HTTP\r\n\r\n")
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400 Bad Request")
