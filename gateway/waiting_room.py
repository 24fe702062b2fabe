"""Where requests wait for the attention tier: from when one enters the gateway until it has ended.

Knows whose turn it is, and asks which group takes it (group_choice.py) whenever either may have
changed. Knows no text and no stream: what comes back for a request is told to its Place.

A request whose group was lost has had its turn: it goes before all that wait in line, and to a
group that has no room where none has.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence as Many

from gateway.callers import Caller
from gateway.cluster import Registry
from gateway.entrance import Entrance, QueueLimits
from gateway.fair_queue import FairQueue
from gateway.group_choice import GroupChoice
from gateway.groups import Group, none_usable, why_unusable
from gateway.place import Place
from gateway.requests import GenerationRequest, Sequence
from moe_core.errors import UnavailableError

BYTES_PER_TOKEN = 40  # of a tuple of ints
DEFAULT_ATTN_WAIT_S = 30.0


class WaitingRoom:
    """Belongs to one event loop. `clock` counts seconds. attn_wait_s: for how long those inside
    wait for a group where none is left that could take them.

    Invariant: between two of its methods nobody waits whose turn it is and who has room.
    """

    def __init__(
        self,
        registry: Registry,
        limits: QueueLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        attn_wait_s: float = DEFAULT_ATTN_WAIT_S,
    ) -> None:
        self.attn_wait_s = attn_wait_s
        self._registry = registry
        self._entrance = Entrance(limits or QueueLimits(), clock)
        self._queue: FairQueue[Place] = FairQueue()
        self._groups = GroupChoice(registry, self.pump)
        self._inside: set[Place] = set()
        self._moving: dict[Place, None] = {}  # in the order in which they lost their groups
        self._giving_up: asyncio.TimerHandle | None = None  # while no group is left
        self._passing = 0  # those that wait without a place in the queue: they can start at once
        self._closed: UnavailableError | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    def usable_groups(self) -> tuple[Group, ...]:
        """Raises UnavailableError when there is none, or nobody is let in any more."""
        if self._closed is not None:
            raise self._closed
        groups = self._groups.usable
        if not groups:
            raise none_usable(self._registry.state)
        return groups

    def enter(self, request: GenerationRequest) -> Place:
        """Let a request in. Raises UnavailableError where nothing could take it,
        TooManyRequestsError where its caller or the queue has too much already."""
        queued = self._has_to_wait(self.usable_groups())
        hold = self._entrance.enter(
            request.caller, _prompt_bytes(request), _least_tokens(request), queued=queued
        )
        place = Place(self, request, hold)
        self._inside.add(place)
        self._empty.clear()
        self._passing += not queued
        self._show()
        return place

    def require_room(self, caller: Caller) -> None:
        """Before a request is read: raises TooManyRequestsError where `enter` would, however small
        the request. Nothing is taken."""
        queued = self._has_to_wait(self._groups.usable)
        self._entrance.require_room(caller, queued=queued)

    def require_tokens(self, requests: Many[GenerationRequest]) -> None:
        """Of requests that belong together: raises as Quotas.check where their caller's quota has
        not as many tokens as all of them may take."""
        self._entrance.require_tokens(requests[0].caller, sum(map(_least_tokens, requests)))

    def _has_to_wait(self, groups: Many[Group]) -> bool:
        return len(self._queue) > 0 or self._passing >= self._groups.free_seats(groups)

    def line_up(self, place: Place, choices: Many[Sequence], held_by: Group | None = None) -> None:
        """The request's tokens are known, and it waits in line from here on; one that `held_by`
        runs already sits there at once."""
        prompt_tokens = len(choices[0].prompt_ids)
        place.choices = choices
        if isinstance(place.request.prompt, str):
            self._entrance.grow(place.hold, BYTES_PER_TOKEN * prompt_tokens)
        most = prompt_tokens + sum(choice.max_tokens for choice in choices)
        self._entrance.reserve(place.hold, most)
        self._queue.push(place.request.caller, place, place.request.priority)
        if held_by is not None:
            self._call(place, held_by)
        self.pump()
        if place.waits and not place.hold.queued:  # the room was taken meanwhile
            self._entrance.queue(place.hold)
            self._passing -= 1
            self._show()

    def move(self, place: Place, choices: Many[Sequence], lost: Group) -> None:
        """The request leaves `lost`, and its `choices` need another group."""
        assert place.seat is not None
        place.seat.leave()
        place.seat, place.choices = None, choices
        self._groups.rest(lost)
        self._moving[place] = None
        self.pump()

    def has_other(self, place: Place) -> bool:
        """Whether there is a group that could go on with a request that runs."""
        return self._groups.has_large(place.choices)

    def why_none(self, place: Place) -> str:
        """Why no group takes the request, group by group."""
        return self._groups.why_none(place.choices)

    def pump(self) -> None:
        """Call whoever has room, in their order; the first that has none keeps its turn."""
        if not (self._moving or len(self._queue)):
            self._stop_giving_up()
            return
        self._pump_moving()
        if not self._groups.usable:
            self._wait_for_groups()
            return
        self._stop_giving_up()
        while (place := self._queue.peek()) is not None:
            try:
                group = self._groups.first(place.choices)
            except UnavailableError as error:
                self._refuse(place, error)
                continue
            if group is None:
                return
            self._call(place, group)

    def _pump_moving(self) -> None:
        for place in tuple(self._moving):
            group = self._groups.another(place.choices)
            if group is None:
                continue
            del self._moving[place]
            place.seat = self._groups.take(group, place.choices)
            place.answer(group)

    def _wait_for_groups(self) -> None:
        if self._giving_up is None and len(self._queue):
            loop = asyncio.get_running_loop()
            self._giving_up = loop.call_later(self.attn_wait_s, self._give_up)

    def _stop_giving_up(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    def _give_up(self) -> None:
        """No group came: all in line are told."""
        self._stop_giving_up()
        reason = UnavailableError(
            f"no attention group can take a request, for {self.attn_wait_s:g} s now: "
            f"{why_unusable(self._registry.state)}"
        )
        for place in self._queue:
            self._refuse(place, reason)

    def received(self, place: Place, num_tokens: int, cached_tokens: int) -> None:
        assert place.seat is not None
        begins = not place.seat.begun
        place.seat.received(num_tokens, cached_tokens)
        place.used_tokens += num_tokens
        self._queue.charge(place.request.caller, num_tokens)
        if begins:
            self.pump()

    def ended(self, place: Place) -> None:
        assert place.seat is not None, "a choice that ends has run"
        place.seat.ended()
        self.pump()

    def stop_waiting(self, place: Place) -> None:
        """Leave the line, and give back what is held in it; without effect on who has."""
        self._moving.pop(place, None)
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
        for place in [place for place in self._inside if place.waits or place in self._moving]:
            self._refuse(place, reason)

    def _refuse(self, place: Place, reason: UnavailableError) -> None:
        self.stop_waiting(place)
        place.answer(reason)

    def _call(self, place: Place, group: Group) -> None:
        prompt_tokens = len(place.choices[0].prompt_ids)
        self.stop_waiting(place)
        self._entrance.called()
        place.seat = self._groups.take(group, place.choices)
        place.used_tokens = prompt_tokens
        self._queue.charge(place.request.caller, prompt_tokens)
        place.answer(group)

    def _show(self) -> None:
        self._registry.queued_requests = self._entrance.num_queued


def _prompt_bytes(request: GenerationRequest) -> int:
    prompt = request.prompt
    return sys.getsizeof(prompt) if isinstance(prompt, str) else BYTES_PER_TOKEN * len(prompt or ())


def _least_tokens(request: GenerationRequest) -> int:
    """The fewest that it may take, as far as can be seen without cutting text into tokens."""
    prompt_tokens = 1 if isinstance(request.prompt, str) else len(request.prompt or ())
    return prompt_tokens + (request.sampling.max_tokens or 1) * (request.sampling.n or 1)
