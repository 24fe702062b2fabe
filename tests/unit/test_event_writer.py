"""Events reach a client in their order, by the step's own write or by the stream's task."""

import asyncio
from contextlib import aclosing

import pytest
from starlette.types import Message

from gateway.http.event_writer import EventWriter, StepWrites


class FakeClient:
    """Reads while `reads` is set. `bodies`: what it was sent, write by write."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.reads.set()
        self.bodies: list[bytes] = []
        self.has_begun = self.has_ended = False
        self.error: Exception | None = None

    async def send(self, message: Message) -> None:
        if self.error is not None:
            raise self.error
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.has_begun = True
        else:
            self.bodies.append(message["body"])
            self.has_ended = not message["more_body"]

    def write_now(self, part: bytes) -> bool:
        if self.error is not None:
            raise self.error
        if self.reads.is_set():
            self.bodies.append(part)
        return self.reads.is_set()


async def begun(client: FakeClient, writes: StepWrites) -> EventWriter:
    writer = EventWriter(client.send, client.write_now, writes)
    assert writer.put(b"0")
    await writer.write()
    assert client.has_begun
    assert client.bodies.pop() == b"0"
    return writer


async def held(client: FakeClient) -> EventWriter:
    """One that waits for its client to read b"1", with b"2" to be written after it."""
    writer = await begun(client, StepWrites())
    client.reads.clear()
    writer.put(b"1")
    await step()
    writer.put(b"2")
    return writer


async def step() -> None:
    """Until what was put is written, if the client reads."""
    for _ in range(4):
        await asyncio.sleep(0)


async def test_events_of_a_step_are_written_together_without_the_streams_task() -> None:
    writes, first, second = StepWrites(), FakeClient(), FakeClient()
    one, other = await begun(first, writes), await begun(second, writes)
    told = [one.put(b"1"), other.put(b"a"), one.put(b"2"), one.put(b"")]
    assert told == [False] * 4
    assert first.bodies == second.bodies == []
    await step()
    assert (first.bodies, second.bodies) == ([b"12"], [b"a"])


async def test_a_response_begins_with_its_first_event_even_an_empty_one() -> None:
    client = FakeClient()
    writer = EventWriter(client.send, client.write_now, StepWrites())
    assert writer.put(b"")
    assert not client.has_begun
    await writer.write()
    assert (client.has_begun, client.bodies) == (True, [])


async def test_a_client_that_does_not_read_holds_up_nobody_and_misses_nothing() -> None:
    writes, slow, quick = StepWrites(), FakeClient(), FakeClient()
    async with (
        aclosing(await begun(slow, writes)) as stalled,
        aclosing(await begun(quick, writes)) as w,
    ):
        slow.reads.clear()
        assert (stalled.put(b"1"), w.put(b"a")) == (False, False)
        await step()
        assert (slow.bodies, quick.bodies) == ([], [b"a"])
        assert (stalled.put(b"2"), stalled.put(b"3"), w.put(b"b")) == (True, True, False)
        task = asyncio.create_task(stalled.write())
        await step()
        assert (slow.bodies, quick.bodies) == ([], [b"a", b"b"])
        assert stalled.put(b"4")
        slow.reads.set()
        await task
        assert slow.bodies == [b"1", b"234"]
        assert not stalled.put(b"5")
        await step()
        await stalled.end(b"end")
        assert slow.bodies == [b"1", b"234", b"5", b"end"]
        assert slow.has_ended


async def test_the_last_event_comes_after_all_that_were_put() -> None:
    client = FakeClient()
    writer = await held(client)
    ending = asyncio.create_task(writer.end(b"end"))
    await step()
    assert not client.bodies
    client.reads.set()
    await ending
    await step()
    assert (client.bodies, client.has_ended) == ([b"1", b"2end"], True)


async def test_what_is_not_written_when_a_stream_is_given_up_is_let_go_of() -> None:
    client = FakeClient()
    writer = await held(client)
    await writer.aclose()
    client.reads.set()
    await step()
    assert client.bodies == []
    assert [
        task.get_name() for task in asyncio.all_tasks() if task.get_name() == "slow client"
    ] == []
    assert writer.put(b"3")
    await step()
    assert client.bodies == []


async def test_a_write_that_fails_fails_its_own_stream_only() -> None:
    writes, broken, sound = StepWrites(), FakeClient(), FakeClient()
    writer, other = await begun(broken, writes), await begun(sound, writes)
    broken.error = RuntimeError("response is over")
    writer.put(b"1")
    other.put(b"a")
    await step()
    assert sound.bodies == [b"a"]
    assert writer.put(b"2")
    with pytest.raises(RuntimeError, match="response is over"):
        await writer.write()


async def test_a_slow_write_that_fails_in_the_end_fails_its_stream() -> None:
    async def send(message: Message) -> None:
        if message.get("body") == b"1":
            await asyncio.sleep(0)
            raise RuntimeError("connection is lost")

    writer = EventWriter(send, lambda part: False, StepWrites())
    await writer.write()
    writer.put(b"1")
    await step()
    with pytest.raises(RuntimeError, match="connection is lost"):
        await writer.end(b"end")
