"""The choices of one request as the gateway reads them from a group's stream."""

import asyncio

import pytest

from gateway.request_stream import Delta, GroupLostError, RequestStream
from moe_core.errors import UnavailableError
from moe_core.parked_kv import ParkedKv


class Link:
    """Says of which sequences it was told that nobody waits for them."""

    def __init__(self, *running: str, hands_over: bool = False) -> None:
        self.running = set(running)
        self.forgotten: list[str] = []
        self.parking: list[str] = []
        self.hands_over = hands_over

    def runs(self, sequence_id: str) -> bool:
        return sequence_id in self.running

    def park(self, sequence_id: str) -> None:
        if sequence_id in self.running:
            self.parking.append(sequence_id)

    def forget(self, sequence_id: str) -> bool:
        was_running = sequence_id in self.running
        self.running.discard(sequence_id)
        if was_running:
            self.forgotten.append(sequence_id)
        return was_running


async def following(stream: RequestStream) -> list[tuple[int, Delta]]:
    return await asyncio.wait_for(stream.next(), 1)


async def test_what_was_on_its_way_to_a_dropped_choice_concerns_nobody() -> None:
    link = Link("a", "b")
    stream = RequestStream(link, {0: "a", 1: "b"})
    stream.put(0, Delta((5,)))
    assert await following(stream) == [(0, Delta((5,)))]
    stream.put(0, Delta((6,)))
    stream.put(0, UnavailableError("the experts are gone"))
    stream.put(1, Delta((7,)))
    stream.drop(0)
    assert await following(stream) == [(1, Delta((7,)))]
    assert link.forgotten == ["a"]


async def test_an_error_waits_behind_what_came_before_it_and_concerns_nobody_once_dropped() -> None:
    stream = RequestStream(Link("a", "b"), {0: "a", 1: "b"})
    stream.put(0, Delta((5,)))
    stream.put(1, Delta((6,)))
    stream.put(0, UnavailableError("the experts are gone"))
    stream.put(1, Delta((7,)))
    assert await following(stream) == [(0, Delta((5,))), (1, Delta((6,)))]
    stream.drop(0)
    assert await following(stream) == [(1, Delta((7,)))]


async def test_abort_ends_the_choices_that_are_still_running() -> None:
    link = Link("b", "c")
    stream = RequestStream(link, {0: "a", 1: "b", 2: "c"})
    stream.abort()
    assert await following(stream) == [(1, Delta((), "abort")), (2, Delta((), "abort"))]
    assert link.forgotten == ["b", "c"]


async def test_the_error_of_one_choice_is_the_requests() -> None:
    stream = RequestStream(Link("a", "b"), {0: "a", 1: "b"})
    stream.put(1, UnavailableError("gone"))
    with pytest.raises(UnavailableError, match="gone"):
        await following(stream)


async def test_a_group_that_is_left_is_told_at_once_and_what_came_before_is_given_out() -> None:
    link = Link("b")
    stream = RequestStream(link, {0: "a", 1: "b"})
    stream.put(1, Delta((5,)))
    stream.leave(GroupLostError("it drains"))
    stream.leave(GroupLostError("told twice"))
    assert link.forgotten == ["b"]
    assert await following(stream) == [(1, Delta((5,)))]
    with pytest.raises(GroupLostError, match="it drains"):
        await following(stream)
    assert stream._items.empty()


async def test_a_group_that_hands_over_is_left_once_all_choices_are_parked_or_have_ended() -> None:
    link = Link("a", "b", "c", hands_over=True)
    stream = RequestStream(link, {0: "a", 1: "b", 2: "c"})
    stream.leave(GroupLostError("it drains"))
    assert (link.parking, link.forgotten) == (["a", "b", "c"], [])
    stream.put(0, Delta((5,)))
    link.running.discard("a")
    stream.put_parked(0, ParkedKv(4, (7,)))
    stream.put(1, Delta((6,), "length"))
    link.running.discard("b")
    stream.put(1, Delta((), "length"))
    assert await following(stream) == [
        (0, Delta((5,))),
        (1, Delta((6,), "length")),
        (1, Delta((), "length")),
    ]
    link.running.discard("c")
    stream.put_parked(2, ParkedKv(5, (8,)))
    with pytest.raises(GroupLostError, match="it drains"):
        await following(stream)
    assert stream.parked == {0: ParkedKv(4, (7,)), 2: ParkedKv(5, (8,))}


async def test_a_choice_that_is_dropped_last_keeps_no_other_from_leaving() -> None:
    link = Link("a", "b", hands_over=True)
    stream = RequestStream(link, {0: "a", 1: "b"})
    stream.leave(GroupLostError("it drains"))
    link.running.discard("a")
    stream.put_parked(0, ParkedKv(4, (7,)))
    stream.drop(1)
    with pytest.raises(GroupLostError, match="it drains"):
        await following(stream)


async def test_a_parked_choice_that_is_dropped_keeps_no_other_from_leaving() -> None:
    link = Link("a", "b", hands_over=True)
    stream = RequestStream(link, {0: "a", 1: "b"})
    stream.leave(GroupLostError("it drains"))
    link.running.clear()
    stream.put_parked(0, ParkedKv(4, (7,)))
    stream.put_parked(1, ParkedKv(4, (8,)))
    stream.drop(0)
    with pytest.raises(GroupLostError, match="it drains"):
        await following(stream)
