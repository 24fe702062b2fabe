"""Writing a part of an answer past `send`, over a real connection."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx2
import pytest
from starlette.types import Receive, Scope, Send

from gateway.http.connection import write_now_of
from gateway.http.event_writer import WriteNow
from gateway.http.host import HttpHost

START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"end", "more_body": False}
Part = Callable[[WriteNow, Receive, Send], Awaitable[None]]


async def answer_to(part: Part, method: str = "POST") -> bytes:
    """Of an application that begins an answer, does `part`, and ends."""
    failures: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        write_now = write_now_of(scope)
        try:
            assert not write_now(b"before it has begun")
            await send(START)
            await part(write_now, receive, send)
            await send(END)
        except BaseException as error:
            failures.append(error)

    host = HttpHost()
    port = await host.start(app, "127.0.0.1", 0)
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=5) as client:
            return (await client.request(method, "/")).content
    finally:
        await host.stop(0.2)
        assert failures == []


async def test_parts_come_in_order_with_those_that_were_sent() -> None:
    async def part(write_now: WriteNow, receive: Receive, send: Send) -> None:
        assert write_now(b"one ")
        await send({"type": "http.response.body", "body": b"two ", "more_body": True})
        assert write_now(b"three ")

    assert await answer_to(part) == b"one two three end"


async def test_an_answer_without_a_body_has_none() -> None:
    async def part(write_now: WriteNow, receive: Receive, send: Send) -> None:
        assert not write_now(b"one")

    assert await answer_to(part, "HEAD") == b""


async def test_nothing_is_written_to_a_client_that_has_gone() -> None:
    async def part(write_now: WriteNow, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        assert not write_now(b"one")

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await answer_to(part)


async def test_a_server_that_cannot_is_one_whose_clients_are_waited_for() -> None:
    assert not write_now_of({"type": "http"})(b"one")
