"""The room as requests pass through it: bounds, turns, refusals, and that nothing stays behind."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.callers import ANONYMOUS, Caller
from gateway.cluster import Registry
from gateway.entrance import QueueLimits
from gateway.registrations import MemberKey
from gateway.requests import GenerationRequest, Sampling, Sequence
from gateway.waiting_room import Place, WaitingRoom
from moe_core.cluster import AttentionLoad, Join, MemberState, Role, StatusReport
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import EpserveError, RequestError, TooManyRequestsError, UnavailableError
from support.patience import patient
from support.small_gateway import FINGERPRINT, make_registry

SEATS = 9  # of max_num_seqs 8
OTHER = Caller("other")


def registry_with(groups: int = 1, total_blocks: int = 64) -> tuple[Registry, list[MemberKey]]:
    registry = make_registry(ParallelConfig(attn_devices=groups, dp_size=groups))
    keys = []
    for rank in range(groups):
        join = Join(Role.ATTN, "h:1", "cpu", 7, FINGERPRINT, rank + 1, "float32", "here", rank)
        keys.append(registry.join(join))
        load = AttentionLoad(0, 0, total_blocks, total_blocks, 4, 8)
        registry.report(keys[-1], StatusReport(MemberState.READY, attention_load=load))
    return registry, keys


def request(
    caller: Caller = ANONYMOUS, prompt: str | tuple[int, ...] = (5, 6), max_tokens: int = 4
) -> GenerationRequest:
    return GenerationRequest("r", "", prompt, Sampling(max_tokens=max_tokens), caller=caller)


def choices(asked: GenerationRequest, count: int = 1) -> list[Sequence]:
    prompt = asked.prompt if isinstance(asked.prompt, tuple) else (5,) * len(asked.prompt or "")
    one = Sequence("r", prompt, asked.sampling.max_tokens or 1, 1, 1, 0, 0, 0, (), 0, (), 0)
    return [replace(one, index=index) for index in range(count)]


@dataclass
class Visitors:
    """Requests inside a room; those whose turn has come are `sent`."""

    room: WaitingRoom
    sent: list[Place] = field(default_factory=list)
    tasks: dict[Place, asyncio.Task[None]] = field(default_factory=dict)

    async def come(self, asked: GenerationRequest, count: int = 1) -> Place:
        place = self.room.enter(asked)
        self.tasks[place] = asyncio.create_task(self._wait(place, count))
        await asyncio.sleep(0)
        return place

    async def _wait(self, place: Place, count: int) -> None:
        with place:
            if await place.turn(choices(place.request, count)) is not None:
                self.sent.append(place)
                await asyncio.Event().wait()

    async def go(self, place: Place) -> None:
        self.tasks[place].cancel()
        await asyncio.wait({self.tasks.pop(place)})
        if place in self.sent:
            self.sent.remove(place)
        await asyncio.sleep(0)

    async def all_go(self) -> None:
        for place in tuple(self.tasks):
            await self.go(place)


async def test_a_group_is_given_little_more_than_it_runs_and_the_rest_waits() -> None:
    registry, _ = registry_with()
    visitors = Visitors(WaitingRoom(registry))
    for _ in range(12):
        await visitors.come(request())
    assert len(visitors.sent) == SEATS
    assert registry.state.members[0].queued_requests == 12 - SEATS
    await visitors.go(visitors.sent[0])
    assert len(visitors.sent) == SEATS
    await visitors.all_go()
    assert registry.state.members[0].queued_requests == 0


async def test_prompts_beyond_the_kv_pool_wait_until_those_before_them_have_begun() -> None:
    registry, _ = registry_with(total_blocks=8)  # 32 tokens
    visitors = Visitors(WaitingRoom(registry))
    first = await visitors.come(request(prompt=(5,) * 20))
    second = await visitors.come(request(prompt=(5,) * 20))
    assert visitors.sent == [first]
    first.received(1, 0)
    await asyncio.sleep(0)
    assert visitors.sent == [first, second]
    await visitors.all_go()


async def test_full_queue_refuses_with_numbers_and_lets_in_again_when_there_is_room() -> None:
    registry, _ = registry_with()
    visitors = Visitors(WaitingRoom(registry, QueueLimits(max_requests=3)))
    for _ in range(SEATS + 3):
        await visitors.come(request())
    with pytest.raises(TooManyRequestsError, match="queue full: 3 requests wait") as caught:
        await visitors.come(request())
    assert 1 <= caught.value.retry_after_s <= 60
    await visitors.go(visitors.sent[0])
    await visitors.come(request())
    await visitors.all_go()


async def test_no_queue_at_all_still_serves_what_has_room() -> None:
    registry, _ = registry_with()
    visitors = Visitors(WaitingRoom(registry, QueueLimits(max_requests=0)))
    for _ in range(SEATS):
        await visitors.come(request())
    with pytest.raises(TooManyRequestsError):
        await visitors.come(request())
    await visitors.all_go()


async def test_queue_is_bounded_in_bytes() -> None:
    registry, _ = registry_with()
    visitors = Visitors(WaitingRoom(registry, QueueLimits(max_bytes=4_000)))
    for _ in range(SEATS):
        await visitors.come(request())
    await visitors.come(request(prompt="x" * 50))
    with pytest.raises(TooManyRequestsError, match="bytes of prompts wait"):
        await visitors.come(request(prompt="x" * 3_000))
    await visitors.all_go()


async def test_one_callers_flood_leaves_room_in_the_queue_and_the_next_turn() -> None:
    registry, _ = registry_with()
    visitors = Visitors(WaitingRoom(registry, QueueLimits(max_requests=8)))
    flooding = Caller("flooding")
    for _ in range(SEATS + 4):
        await visitors.come(request(flooding))
    with pytest.raises(TooManyRequestsError, match="4 requests wait, 4 of them flooding's"):
        await visitors.come(request(flooding))
    quiet = await visitors.come(request(OTHER))
    visitors.sent[0].received(1, 0)
    await visitors.go(visitors.sent[0])
    assert visitors.sent[-1] is quiet
    await visitors.all_go()


async def test_abort_ends_the_wait_without_a_group() -> None:
    registry, _ = registry_with()
    visitors = Visitors(WaitingRoom(registry))
    places = [await visitors.come(request()) for _ in range(SEATS + 1)]
    assert places[-1].abort()
    assert not places[-1].abort()
    await asyncio.wait({visitors.tasks[places[-1]]})
    assert visitors.tasks[places[-1]].exception() is None
    assert places[-1] not in visitors.sent
    await visitors.all_go()


async def test_who_waits_is_told_when_the_last_group_leaves() -> None:
    registry, (key,) = registry_with()
    visitors = Visitors(room := WaitingRoom(registry, attn_wait_s=0.01))
    places = [await visitors.come(request()) for _ in range(SEATS + 2)]
    registry.leave(key)
    room.pump()
    for place in places[SEATS:]:
        await asyncio.wait({visitors.tasks[place]})
        assert isinstance(visitors.tasks[place].exception(), UnavailableError)
    await visitors.all_go()


async def test_closed_room_finishes_who_is_inside_and_then_is_empty() -> None:
    registry, _ = registry_with()
    visitors = Visitors(room := WaitingRoom(registry))
    for _ in range(SEATS + 2):
        await visitors.come(request())
    room.close(UnavailableError("shutting down"))
    with pytest.raises(UnavailableError, match="shutting down"):
        await visitors.come(request())
    empty = asyncio.create_task(room.until_empty())
    for _ in range(SEATS + 2):
        assert visitors.sent
        await visitors.go(visitors.sent[0])
    async with asyncio.timeout(5):
        await empty


async def test_quota_is_of_tokens_used_and_a_waiting_request_that_leaves_used_none() -> None:
    registry, _ = registry_with()
    visitors = Visitors(WaitingRoom(registry, clock=lambda: 0.0))
    caller = Caller("c", max_tokens_per_minute=20)
    place = await visitors.come(request(caller, max_tokens=18))
    with pytest.raises(TooManyRequestsError, match="0 tokens are left"):
        await visitors.come(request(caller, max_tokens=1))
    place.received(3, 0)
    await visitors.go(place)
    with pytest.raises(TooManyRequestsError, match="15 tokens are left"):
        await visitors.come(request(caller, max_tokens=18))
    with pytest.raises(RequestError, match="may make 21 tokens"):
        await visitors.come(request(caller, max_tokens=19))
    await visitors.go(await visitors.come(request(caller, max_tokens=13)))


events = st.tuples(
    st.sampled_from(["come", "go", "abort", "token", "end"]), st.integers(0, 30), st.integers(1, 12)
)


@patient
@given(st.lists(events, max_size=120))
def test_bounds_hold_and_nothing_stays_behind_whatever_happens(
    happened: list[tuple[str, int, int]],
) -> None:
    asyncio.run(_random_visits(happened))


async def _random_visits(happened: list[tuple[str, int, int]]) -> None:
    registry, _ = registry_with(groups=2, total_blocks=16)
    visitors = Visitors(room := WaitingRoom(registry, QueueLimits(6, 5_000), lambda: 0.0))
    callers = [Caller("a"), Caller("b", 2.0, 5), Caller("c", 1.0, None, 100)]
    for what, which, size in happened:
        inside = tuple(visitors.tasks)
        if what == "come":
            asked = request(callers[which % 3], (5,) * size, max_tokens=1 + which)
            with suppress(EpserveError):
                await visitors.come(asked, 1 + which % 3)
        elif what in ("token", "end") and visitors.sent:
            place = visitors.sent[which % len(visitors.sent)]
            place.received(1, size)
            if what == "end":
                await visitors.go(place)
        elif inside and what == "abort":
            inside[which % len(inside)].abort()
        elif inside:
            await visitors.go(inside[which % len(inside)])
        await asyncio.sleep(0)
        assert registry.queued_requests <= 6
        assert sum(len(place.choices) for place in visitors.sent) <= 2 * SEATS
    await visitors.all_go()
    assert registry.queued_requests == 0
    async with asyncio.timeout(5):
        await room.until_empty()
    for _ in range(2 * SEATS):  # all seats, and no quota, is held by who has gone
        await visitors.come(request())
    assert len(visitors.sent) == 2 * SEATS
    await visitors.all_go()
