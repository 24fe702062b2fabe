"""What a connection takes before there is a request on it, and for how long."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx2
import pytest

from gateway.http import bounded_connection
from gateway.http.bounded_connection import MAX_HEAD_BYTES
from moe_core.cluster import Role
from support.fake_attention import FakeAttention
from support.http_gateway import http_side, opened
from support.small_gateway import SmallGateway
from support.words import word_tokenizer

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
BODY = b'{"prompt":[5],"stream":true}'
CHUNKS = POST + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(BODY), BODY)
ENDLESS = {
    "a header": (GET + b"x: ", b"a"),
    "a header's name": (GET, b"a"),
    "many headers": (GET, b"x: a\r\n"),
    "a URL": (b"GET /", b"a"),
    "a query": (b"GET /health?", b"a"),
    "a chunk's extension": (POST + b"transfer-encoding: chunked\r\n\r\n1;", b"a"),
}


@pytest.fixture
def fake() -> FakeAttention:
    return FakeAttention(lambda prompt: [6, 7, 8, 9], step_s=0.2)


@pytest.fixture
async def client(fake: FakeAttention) -> AsyncIterator[httpx2.AsyncClient]:
    async with SmallGateway(tokenizer=word_tokenizer()) as gateway, http_side(gateway) as client:
        await gateway.add_worker(Role.ATTN, fake)
        yield client


async def refusal(reader: asyncio.StreamReader) -> tuple[bytes, dict[str, str]]:
    """The status line of the last answer, and its error."""
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return head.partition(b"\r\n")[0], json.loads(body)["error"]


@pytest.mark.parametrize("what", ENDLESS)
async def test_what_would_never_end_is_431_and_nothing_more_is_kept(
    client: httpx2.AsyncClient, what: str
) -> None:
    begin, again = ENDLESS[what]
    async with asyncio.timeout(10), opened(client) as (reader, writer):
        writer.write(begin + again * (2 * MAX_HEAD_BYTES // len(again)))
        status, error = await refusal(reader)
    assert status == b"HTTP/1.1 431 Request Header Fields Too Large"
    assert error["code"] == "head_too_large"
    assert f"over {MAX_HEAD_BYTES} bytes" in error["message"]


async def test_trailers_are_limited_as_well(
    client: httpx2.AsyncClient, fake: FakeAttention
) -> None:
    async with asyncio.timeout(10), opened(client) as (reader, writer):
        writer.write(CHUNKS + b"0\r\nx: " + b"a" * 1_000)
        await asyncio.sleep(0.1)
        writer.write(b"a" * 2 * MAX_HEAD_BYTES)
        status, _ = await refusal(reader)
    assert status == b"HTTP/1.1 431 Request Header Fields Too Large"
    assert fake.added == []


async def test_a_head_below_the_limit_and_a_body_above_it_are_read(
    client: httpx2.AsyncClient,
) -> None:
    async with asyncio.timeout(10), opened(client) as (reader, writer):
        writer.write(GET + b"x: " + b"a" * (MAX_HEAD_BYTES - 1_000) + b"\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    large = {"prompt": [5], "user": "a" * 3 * MAX_HEAD_BYTES}
    assert (await client.post("/v1/completions", json=large)).status_code == 200


async def test_half_of_a_head_is_408_in_time(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_connection, "HEAD_TIMEOUT_S", 0.3)
    async with asyncio.timeout(10), opened(client) as (reader, writer):
        writer.write(GET)
        status, error = await refusal(reader)
    assert status == b"HTTP/1.1 408 Request Timeout"
    assert error["code"] == "head_timeout"


async def test_a_connection_on_which_nothing_comes_is_closed_without_a_word(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_connection, "HEAD_TIMEOUT_S", 0.3)
    async with asyncio.timeout(10), opened(client) as (reader, _):
        assert await reader.read() == b""


async def test_a_connection_is_kept_for_a_next_request(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_connection, "HEAD_TIMEOUT_S", 0.3)
    async with asyncio.timeout(10), opened(client) as (reader, writer):
        writer.write(GET + b"\r\n")
        await reader.readuntil(b"alive")
        await asyncio.sleep(0.6)
        writer.write(GET + b"\r\n")
        await reader.readuntil(b"alive")


async def test_half_of_a_next_request_leaves_the_answer_before_it_alone(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_connection, "HEAD_TIMEOUT_S", 0.2)
    async with asyncio.timeout(10), opened(client) as (reader, writer):
        writer.write(POST + b"content-length: %d\r\n\r\n%b%b" % (len(BODY), BODY, GET))
        answer = await reader.readuntil(b"[DONE]")
        await reader.readuntil(b"\r\n0\r\n\r\n")
        status, _ = await refusal(reader)
    assert answer.count(b"data: {") == 4
    assert status == b"HTTP/1.1 408 Request Timeout"


async def test_a_request_for_a_websocket_is_answered_in_http_and_not_warned_of(
    client: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    async with asyncio.timeout(10), opened(client) as (reader, writer):
        writer.write(GET + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    assert caplog.records == []
