"""One dispatch from the time it is sent until its combine is released.

Knows what a waiter is told, and how the chunks of one dispatch are joined again. Knows neither
slots' memory nor a wire: its link reports what arrives.
"""

import asyncio
from typing import Protocol

import torch

from moe_core.errors import PeerLostError, PeerTimeoutError, TransportError
from moe_core.transport.base import Combine, DispatchKey
from moe_core.transport.layout import copy_values


class Named(Protocol):
    """What an error message says of a dispatch."""

    @property
    def key(self) -> DispatchKey: ...
    @property
    def num_tokens(self) -> int: ...


class PendingHost(Protocol):
    """What a pending dispatch asks of its link."""

    peer: str
    loop: asyncio.AbstractEventLoop

    async def departed(self, slot: int, what: Named, deadline: float) -> None: ...
    def look_for(self, pending: "Pending") -> None: ...
    def give_slot(self, slot: int) -> None: ...
    def is_owed(self, pending: "Pending") -> bool: ...
    async def phase_of(self, pending: "Pending") -> str: ...
    def timeout_error(self, what: Named, waited_s: float, phase: str) -> PeerTimeoutError: ...


class Pending:
    """One dispatch of a caller: one or more chunks, one combine.

    The answer to a single chunk stays in its slot, which `_held` names, until it is released;
    several are joined in memory of their own, and their slots are free at once.
    """

    __slots__ = (
        "_answered",
        "_chunks_left",
        "_compute_us",
        "_held",
        "_link",
        "_parts",
        "_queue_us",
        "_result",
        "_since",
        "_waiter",
        "key",
        "num_tokens",
        "slot",
    )

    def __init__(self, link: PendingHost, key: DispatchKey, num_tokens: int, chunks: int) -> None:
        self.key = key
        self.num_tokens = num_tokens
        self._chunks_left = chunks
        self.slot = 0  # that the last chunk was sent from
        self._link = link
        self._held: int | None = None
        self._parts: torch.Tensor | None = None
        self._answered: tuple[slice, ...] = ()
        self._queue_us = self._compute_us = 0
        # Errors are results here: a dispatch that nobody waits for any more is not a mistake.
        self._result: Combine | TransportError | None = None
        self._since = link.loop.time()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def wanted(self) -> bool:
        return self._result is None

    async def left(self, timeout_s: float) -> None:
        if self._result is None:
            await self._link.departed(self.slot, self, self._link.loop.time() + timeout_s)

    @property
    def done(self) -> bool:
        return self._result is not None

    @property
    def owed(self) -> bool:
        return self._link.is_owed(self)

    async def settled(self, timeout_s: float) -> bool:
        if self._result is None:
            self._link.look_for(self)
        if self._result is None:
            waiter = self._waiter = self._link.loop.create_future()
            timer = self._link.loop.call_later(timeout_s, _wake, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
        return self._result is not None

    def result(self) -> Combine:
        result = self._result
        if isinstance(result, Combine):
            return result
        assert result is not None
        raise result

    def answered_chunks(self) -> tuple[tuple[slice, ...], torch.Tensor] | None:
        return None if self._parts is None else (self._answered, self._parts)

    async def wait(self, timeout_s: float) -> Combine:
        try:
            if not await self.settled(timeout_s):
                await self._expire()
        finally:
            if self._result is None:
                self.release()
        return self.result()

    async def _expire(self) -> None:
        """An answer that comes while the peer is asked counts."""
        waited_s = self._link.loop.time() - self._since
        phase = await self._link.phase_of(self)
        self.finish(self._link.timeout_error(self, waited_s, phase))

    def release(self) -> None:
        if self._result is None:
            self.finish(PeerLostError(f"{self._link.peer}: its answer is not wanted any more"))
        held, self._held = self._held, None
        if held is not None:
            self._link.give_slot(held)

    def finish(self, result: Combine | TransportError) -> None:
        """The first result counts."""
        if self._result is None:
            self._result = result
            if self._waiter is not None:
                _wake(self._waiter)

    def take(self, slot: int, partial: torch.Tensor, queue_us: int, compute_us: int) -> None:
        """The whole answer, which stays where it is."""
        self._held = slot
        self.finish(Combine(self.key, partial, queue_us, compute_us))

    def take_part(self, rows: slice, partial: torch.Tensor, queue_us: int, compute_us: int) -> None:
        """One chunk's rows, which are copied."""
        if self._parts is None:
            self._parts = partial.new_empty((self.num_tokens, *partial.shape[1:]))
        copy_values(self._parts[rows], partial)
        self._answered = (*self._answered, rows)
        self._queue_us = max(self._queue_us, queue_us)
        self._compute_us += compute_us
        self._chunks_left -= 1
        if self._chunks_left == 0:
            self.finish(Combine(self.key, self._parts, self._queue_us, self._compute_us))


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
