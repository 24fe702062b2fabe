"""One request inside the waiting room: what it holds, and how it is told that its turn has come.

Knows one request's wait, for its first group and, where that is lost, for another. Knows no other
request and no group: the room does.
"""

import asyncio
from collections.abc import Sequence as Many
from typing import Protocol

from gateway.entrance import Hold
from gateway.group_room import Seat
from gateway.groups import Group
from gateway.requests import GenerationRequest, Sequence
from moe_core.errors import EpserveError, UnavailableError


class Room(Protocol):
    """What a place asks of its room."""

    attn_wait_s: float

    def line_up(
        self, place: "Place", choices: Many[Sequence], held_by: Group | None = None
    ) -> None: ...

    def move(self, place: "Place", choices: Many[Sequence], lost: Group) -> None: ...

    def has_other(self, place: "Place") -> bool: ...

    def why_none(self, place: "Place") -> str: ...

    def received(self, place: "Place", num_tokens: int, cached_tokens: int) -> None: ...

    def ended(self, place: "Place") -> None: ...

    def stop_waiting(self, place: "Place") -> None: ...

    def leave(self, place: "Place") -> None: ...


class Place:
    """One request inside the room. A context manager, which leaves.

    It waits until it is called, fails or is aborted: `waits` is until when it holds what a
    waiting request holds. After it was called it has a seat, except while it moves from one group
    to another.
    """

    def __init__(self, room: Room, request: GenerationRequest, hold: Hold) -> None:
        self.request = request
        self.hold = hold
        self.waits = True
        self.choices: Many[Sequence] = ()
        self.seat: Seat | None = None
        self.used_tokens = 0
        self.aborted = False
        self._room = room
        self._turn: asyncio.Future[Group | None] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self._room.leave(self)

    async def turn(self, choices: Many[Sequence], held_by: Group | None = None) -> Group | None:
        """The group that takes the request, once it is its turn; None where it was aborted before.
        One that `held_by` runs already waits for nobody.

        Raises TooManyRequestsError or RequestError for what only its tokens show, UnavailableError
        when no group has been left for `attn_wait_s`. How long to wait for its turn is the client's
        deadline.
        """
        if self.waits:
            self._room.line_up(self, choices, held_by)
        group = await self._turn
        return None if self.aborted else group

    async def next_group(self, choices: Many[Sequence], lost: Group) -> Group | None:
        """The group that goes on with `choices`, which `lost` cannot; None where the request was
        aborted before. Raises UnavailableError where none takes them within `attn_wait_s`."""
        self._turn = asyncio.get_running_loop().create_future()
        self._room.move(self, choices, lost)
        try:
            async with asyncio.timeout(self._room.attn_wait_s):
                group = await self._turn
            return None if self.aborted else group
        except TimeoutError:
            raise UnavailableError(
                f"no other attention group took the request over within "
                f"{self._room.attn_wait_s:g} s: {self._room.why_none(self)}"
            ) from None
        finally:
            self._room.stop_waiting(self)

    def has_other_group(self) -> bool:
        """Whether the request could move now."""
        return self._room.has_other(self)

    def received(self, num_tokens: int, cached_tokens: int) -> None:
        """Tokens came from the group; `cached_tokens` of the prompt were there already."""
        self._room.received(self, num_tokens, cached_tokens)

    def ended(self) -> None:
        """One of the choices has ended."""
        self._room.ended(self)

    def abort(self) -> bool:
        """End the wait, and any that would follow. False where it does not wait."""
        self.aborted = True
        if self._turn.done():
            return False
        self._room.stop_waiting(self)
        self.answer(None)
        return True

    def answer(self, result: Group | EpserveError | None) -> None:
        """What `turn` or `next_group` gives or raises; nobody may be there to take it."""
        if self._turn.done():
            return
        if isinstance(result, EpserveError):
            self._turn.set_exception(result)
            self._turn.exception()  # else asyncio complains where nobody takes it
        else:
            self._turn.set_result(result)
