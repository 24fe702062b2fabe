"""The choices of one request on an engine, and the queue of what is said of them.

Knows which choices were dropped, and when a request can leave its group. Knows no message and no
text: a link brings what the engine says.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gateway.requests import TokenLogprobs
from moe_core.errors import EpserveError, UnavailableError
from moe_core.parked_kv import ParkedKv

ABORTED = "abort"


class Link(Protocol):
    """What a request's stream asks of the stream that all of a group's requests share."""

    @property
    def hands_over(self) -> bool:
        """Whether the engine parks sequences."""

    def runs(self, sequence_id: str) -> bool:
        """Whether the sequence's last output is still to come, and wanted."""

    def forget(self, sequence_id: str) -> bool:
        """Nobody wants the sequence any more; whether it was still running."""

    def park(self, sequence_id: str) -> None:
        """Another group is to go on with it; without effect where it is not running."""


class GroupLostError(UnavailableError):
    """This group cannot go on with a request, through no fault of the request: another group can.

    So it is when the group's stream ends, with whatever status; when the group leaves; and with
    what its engine marks go_elsewhere (attention.proto says which that is). Whatever else an engine
    answers is the request's own end.
    """


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice; finish_reason is empty while it runs. logprobs has one entry per
    token, or none. With the first token come cached_tokens, those of the prompt that were found in
    the KV cache, queued_s, the seconds until its first step, and prompt_logprobs, where asked for
    one for each token of the prompt but the first."""

    token_ids: tuple[int, ...]
    finish_reason: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0
    queued_s: float | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class RequestStream:
    """The choices of one request on an engine, from their submission until each has finished or
    is let go of."""

    def __init__(self, link: Link, sequence_ids: Mapping[int, str]) -> None:
        """`sequence_ids`: by the choice's index."""
        self.parked: dict[int, ParkedKv] = {}  # of the choices that the engine has let go of
        self._leaving: GroupLostError | None = None
        self._told: set[int] = set()  # parked ones of which `next` will know
        self._link = link
        self._sequence_ids = dict(sequence_ids)
        self._dropped: set[int] = set()
        self._items: asyncio.Queue[tuple[int, Delta | EpserveError]] = asyncio.Queue()
        self._held: tuple[int, EpserveError] | None = None  # what follows a batch

    async def next(self) -> list[tuple[int, Delta]]:
        """All that has come of choices that were not dropped, in order, with their indices; waits
        until there is something. Raises GroupLostError when the group is lost, or the error with
        which the engine ended such a choice, once what came before it was given out. How long to
        wait is the client's deadline: a lost group always ends the wait."""
        found = [await self._next_one()]
        while self._held is None and not self._items.empty():
            index, item = self._items.get_nowait()
            if isinstance(item, EpserveError):
                self._held = index, item
            elif index not in self._dropped:
                found.append((index, item))
        return found

    async def _next_one(self) -> tuple[int, Delta]:
        while True:
            held, self._held = self._held, None
            index, item = held or await self._items.get()
            if index in self._dropped:
                continue  # it was on its way
            if isinstance(item, EpserveError):
                raise item
            return index, item

    def put(self, index: int, item: Delta | EpserveError) -> None:
        """What the engine has to say of one choice."""
        self._items.put_nowait((index, item))
        self._leave_if_all_parked()

    def put_parked(self, index: int, parked: ParkedKv) -> None:
        """The engine has let go of one choice, and said all of it before."""
        self.parked[index] = parked
        self._leave_if_all_parked()

    def abort(self) -> None:
        """End the request now: the engine drops the choices that are still running, and `next`
        gives each of them a last, aborted delta."""
        for index, sequence_id in self._sequence_ids.items():
            if self._link.forget(sequence_id):
                self.put(index, Delta((), ABORTED))

    def leave(self, reason: GroupLostError) -> None:
        """Let go of all choices; `next` raises `reason` where one was still running. An engine that
        hands over parks them first: what it has computed until then is given out, and `parked` says
        what it keeps."""
        if self._leaving is not None:
            return
        self._leaving = reason
        for index, sequence_id in self._sequence_ids.items():
            if self._link.hands_over:
                self._link.park(sequence_id)
            elif self._link.forget(sequence_id):
                self.put(index, reason)

    def drop(self, index: int) -> None:
        """Let go of one choice; the engine is told unless it has finished it itself."""
        self._dropped.add(index)
        self._link.forget(self._sequence_ids[index])
        self._leave_if_all_parked()

    def _leave_if_all_parked(self) -> None:
        """Once no choice is running any more, those that are parked have to go elsewhere."""
        reason = self._leaving
        if reason is None or any(map(self._link.runs, self._sequence_ids.values())):
            return
        for index in self.parked.keys() - self._told:
            self._told.add(index)
            self._items.put_nowait((index, reason))

    def close(self) -> None:
        """Let go of all choices."""
        for sequence_id in self._sequence_ids.values():
            self._link.forget(sequence_id)
