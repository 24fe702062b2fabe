"""Where requests wait for the attention tier: from when one enters the gateway until it has ended.

Knows whose turn it is and which group has room, and brings the two together whenever either
changes. Knows no text and no stream: what comes back for a request is told to its Place.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence as Many

from gateway.balancer import Balancer, Group, require_groups
from gateway.cluster import Registry
from gateway.entrance import Entrance, Hold, QueueLimits
from gateway.fair_queue import FairQueue
from gateway.group_room import GroupRoom, Seat
from gateway.requests import GenerationRequest, Sequence
from moe_core.errors import EpserveError, UnavailableError

BYTES_PER_TOKEN = 40  # of a tuple of ints


class Place:
    """One request inside the room. A context manager, which leaves.

    It waits until it is called, fails or is aborted: `waits` is until when it holds what a
    waiting request holds. After it was called it has a seat.
    """

    def __init__(self, room: "WaitingRoom", request: GenerationRequest, hold: Hold) -> None:
        self.request = request
        self.hold = hold
        self.waits = True
        self.choices: Many[Sequence] = ()
        self.seat: Seat | None = None
        self.used_tokens = 0
        self._room = room
        self._turn: asyncio.Future[Group | None] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self._room.leave(self)

    async def turn(self, choices: Many[Sequence]) -> Group | None:
        """The group that takes the request, once it is its turn; None where it was aborted before.

        Raises TooManyRequestsError or RequestError for what only its tokens show, UnavailableError
        when no group is left. How long to wait is the client's deadline: a lost tier always
        ends the wait.
        """
        if self.waits:
            self._room.line_up(self, choices)
        return await self._turn

    def received(self, num_tokens: int, cached_tokens: int) -> None:
        """Tokens came from the group; `cached_tokens` of the prompt were there already."""
        self._room.received(self, num_tokens, cached_tokens)

    def ended(self) -> None:
        """One of the choices has ended."""
        self._room.ended(self)

    def abort(self) -> bool:
        """End the wait. False where it is over already."""
        if not self.waits:
            return False
        self._room.stop_waiting(self)
        self.answer(None)
        return True

    def answer(self, result: Group | EpserveError | None) -> None:
        """What `turn` gives or raises; nobody may be there to take it."""
        if self._turn.done():
            return
        if isinstance(result, EpserveError):
            self._turn.set_exception(result)
            self._turn.exception()  # else asyncio complains where nobody takes it
        else:
            self._turn.set_result(result)


class WaitingRoom:
    """Belongs to one event loop. `clock` counts seconds.

    Invariant: between two of its methods nobody waits whose turn it is and who has room.
    """

    def __init__(
        self,
        registry: Registry,
        limits: QueueLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._entrance = Entrance(limits or QueueLimits(), clock)
        self._queue: FairQueue[Place] = FairQueue()
        self._groups = GroupRoom()
        self._balancer = Balancer()
        self._inside: set[Place] = set()
        self._passing = 0  # those that wait without a place in the queue: they can start at once
        self._closed: UnavailableError | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    def usable_groups(self) -> tuple[Group, ...]:
        """Raises UnavailableError when there is none, or nobody is let in any more."""
        if self._closed is not None:
            raise self._closed
        return require_groups(self._registry.state)

    def enter(self, request: GenerationRequest) -> Place:
        """Let a request in. Raises UnavailableError where nothing could take it,
        TooManyRequestsError where its caller or the queue has too much already."""
        free = self._groups.free_seats(self.usable_groups())
        queued = len(self._queue) > 0 or self._passing >= free
        hold = self._entrance.enter(
            request.caller, _prompt_bytes(request), _least_tokens(request), queued=queued
        )
        place = Place(self, request, hold)
        self._inside.add(place)
        self._empty.clear()
        self._passing += not queued
        self._show()
        return place

    def line_up(self, place: Place, choices: Many[Sequence]) -> None:
        """The request's tokens are known, and it waits in line from here on."""
        prompt_tokens = len(choices[0].prompt_ids)
        place.choices = choices
        if isinstance(place.request.prompt, str):
            self._entrance.grow(place.hold, BYTES_PER_TOKEN * prompt_tokens)
        most = prompt_tokens + sum(choice.max_tokens for choice in choices)
        self._entrance.reserve(place.hold, most)
        self._queue.push(place.request.caller, place, place.request.priority)
        self.pump()
        if place.waits and not place.hold.queued:  # the room was taken meanwhile
            self._entrance.queue(place.hold)
            self._passing -= 1
            self._show()

    def pump(self) -> None:
        """Call whoever has room, in their order; the first that has none keeps its turn."""
        while (place := self._queue.peek()) is not None:
            try:
                group = self._group_for(place.choices)
            except UnavailableError as error:
                self._refuse(place, error)
                continue
            if group is None:
                return
            self._call(place, group)

    def received(self, place: Place, num_tokens: int, cached_tokens: int) -> None:
        assert place.seat is not None
        begins = not place.seat.begun
        place.seat.received(num_tokens, cached_tokens)
        place.used_tokens += num_tokens
        self._queue.charge(place.request.caller, num_tokens)
        if begins:
            self.pump()

    def ended(self, place: Place) -> None:
        assert place.seat is not None
        place.seat.ended()
        self.pump()

    def stop_waiting(self, place: Place) -> None:
        """Leave the line, and give back what is held in it; without effect on who has."""
        if not place.waits:
            return
        place.waits = False
        self._queue.remove(place)
        self._passing -= not place.hold.queued
        self._entrance.stop_waiting(place.hold)
        self._show()

    def leave(self, place: Place) -> None:
        """The request has ended, however far it came."""
        self.stop_waiting(place)
        if place.seat is not None:
            place.seat.leave()
        self._entrance.leave(place.hold, place.used_tokens)
        self._inside.remove(place)
        if not self._inside:
            self._empty.set()
        self.pump()

    def close(self, reason: UnavailableError) -> None:
        """Let nobody in any more; those inside go on."""
        self._closed = reason

    async def until_empty(self) -> None:
        """Until no request is inside; the caller sets the deadline."""
        await self._empty.wait()

    def refuse_waiting(self, reason: UnavailableError) -> None:
        """Nobody who waits has a turn any more."""
        for place in [place for place in self._inside if place.waits]:
            self._refuse(place, reason)

    def _refuse(self, place: Place, reason: UnavailableError) -> None:
        self.stop_waiting(place)
        place.answer(reason)

    def _call(self, place: Place, group: Group) -> None:
        prompt_tokens = len(place.choices[0].prompt_ids)
        self.stop_waiting(place)
        self._entrance.called()
        place.seat = self._groups.take(group, len(place.choices), prompt_tokens)
        place.used_tokens = prompt_tokens
        self._queue.charge(place.request.caller, prompt_tokens)
        place.answer(group)

    def _group_for(self, choices: Many[Sequence]) -> Group | None:
        """None where it has to wait. Raises UnavailableError where no group could hold it."""
        first, count = choices[0], len(choices)
        groups = require_groups(self._registry.state)
        large = [group for group in groups if group.kv_tokens >= first.num_tokens]
        free = [g for g in large if self._groups.fits(g, count, len(first.prompt_ids))]
        if large and not free:
            return None
        return self._balancer.choose(free, first.num_tokens, count)

    def _show(self) -> None:
        self._registry.queued_requests = self._entrance.num_queued


def _prompt_bytes(request: GenerationRequest) -> int:
    prompt = request.prompt
    return sys.getsizeof(prompt) if isinstance(prompt, str) else BYTES_PER_TOKEN * len(prompt or ())


def _least_tokens(request: GenerationRequest) -> int:
    """The fewest that it may take, as far as can be seen without cutting text into tokens."""
    prompt_tokens = 1 if isinstance(request.prompt, str) else len(request.prompt or ())
    return prompt_tokens + (request.sampling.max_tokens or 1) * (request.sampling.n or 1)
