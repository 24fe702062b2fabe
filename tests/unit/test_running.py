"""A request while it runs: what its task is given, in which order, and what it is told instead."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from gateway.groups import Group
from gateway.observers import NoObserver
from gateway.request_stream import Delta, RequestStream, Taker
from gateway.requests import Chunk, Sequence
from gateway.running import RunningRequest
from gateway.sequence_output import SequenceOutput
from moe_core.cluster import AttentionLoad, Member, MemberState, Role
from moe_core.errors import UnavailableError
from support.stream_ends import Link

LEADER = Member(Role.ATTN, 0, 5, "127.0.0.1:9", "cpu", MemberState.READY, 1, "here")
GROUP = Group(0, LEADER, AttentionLoad(0, 0, 64, 64, 4, 64))


class Pool:
    """Keeps the stream, for a test to say what comes."""

    stream: RequestStream

    def submit(
        self, group: Group, choices: list[Sequence], taker: Taker, *, take_over: bool
    ) -> RequestStream:
        ids = {each.index: each.sequence_id for each in choices}
        self.stream = RequestStream(Link(*ids.values()), ids, taker)
        return self.stream


class Place:
    aborted = False

    def received(self, num_tokens: int, cached_tokens: int) -> None: ...

    def ended(self) -> None: ...


def choice(index: int) -> Sequence:
    return Sequence("r", (5,), 9, 0.0, 1.0, 0, 0.0, 0, (), 0, (), 0, index=index)


def request_of(
    num_choices: int, shape: Callable[[Chunk], Any] = lambda chunk: (chunk.index, chunk.token_ids)
) -> tuple[RunningRequest[Any], RequestStream]:
    pool: Any = Pool()
    place: Any = Place()
    choices = [choice(index) for index in range(num_choices)]
    outputs = [SequenceOutput(each, None) for each in choices]
    running = RunningRequest(pool, place, choices, outputs, shape, GROUP, NoObserver())
    return running, pool.stream


async def following(running: RunningRequest[Any]) -> list[Any]:
    return await asyncio.wait_for(running.next(), 1)


async def test_all_that_has_come_is_given_at_once_and_in_order() -> None:
    running, stream = request_of(2)
    waiting = asyncio.create_task(following(running))
    await asyncio.sleep(0)
    stream.put(1, Delta((7,)))
    stream.put(0, Delta((5,)))
    stream.put(0, Delta(()))  # says nothing
    stream.put(1, Delta((8,), "length"))
    assert await waiting == [(1, (7,)), (0, (5,)), (1, (8,))]
    assert not running.ended
    stream.put(0, Delta((), "length"))
    assert await following(running) == [(0, ())]
    assert running.ended


async def test_an_error_is_raised_once_what_came_before_it_was_given() -> None:
    running, stream = request_of(2)
    stream.put(0, Delta((5,)))
    stream.fail(1, UnavailableError("the experts are gone"))
    stream.put(0, Delta((6,)))
    assert await following(running) == [(0, (5,))]
    with pytest.raises(UnavailableError, match="the experts are gone"):
        await following(running)


async def test_a_last_chunk_that_cannot_be_shaped_is_an_error_and_no_end() -> None:
    def shape(chunk: Chunk) -> int:
        return len(chunk.token_ids) // (not chunk.finish_reason)

    running, stream = request_of(1, shape)
    stream.put(0, Delta((5,)))
    stream.put(0, Delta((6,), "length"))
    assert await following(running) == [1]
    assert not running.ended
    with pytest.raises(ZeroDivisionError):
        await following(running)
