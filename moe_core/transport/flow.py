"""What the attention's end of every link has in common: slots, chunks, waiting, late answers.

Knows when a slot is free, how a batch is cut into chunks and joined again, and what a waiter is
told. Knows no wire: a subclass sends one chunk (`_post`) and reports what came back
(`_answered`, `_failed`, `_lost`).

Invariant: a slot is in exactly one of `SlotPool` and `_in_flight`. It goes back to the pool only
when the peer's answer to its last sequence is here, so what a waiter does in the meantime (be
cancelled, time out) can neither leak a slot nor free it early.
"""

import asyncio
from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch

from moe_core.errors import PeerFailedError, PeerLostError, PeerTimeoutError, TransportError
from moe_core.transport.base import (
    Combine,
    Dispatch,
    DispatchKey,
    ExpertLink,
    LinkCounters,
    LinkSpec,
)
from moe_core.transport.chunks import check_shapes, split
from moe_core.transport.layout import SlotLayout, copy_values
from moe_core.transport.slots import SlotPool


class Named(Protocol):
    """What an error message says of a dispatch."""

    @property
    def key(self) -> DispatchKey: ...
    @property
    def num_tokens(self) -> int: ...


class Pending:
    """One dispatch of a caller: one or more chunks, one combine."""

    __slots__ = (
        "_chunks_left", "_compute_us", "_device", "_link", "_partial", "_queue_us", "_result",
        "key", "num_tokens",
    )  # fmt: skip

    def __init__(self, link: "ChunkedLink", dispatch: Dispatch, chunks: int) -> None:
        self._link = link
        self._chunks_left = chunks
        self._device = dispatch.hidden_states.device
        self._partial: torch.Tensor | None = None
        self._queue_us = self._compute_us = 0
        self.key = dispatch.key
        self.num_tokens = dispatch.num_tokens
        # Errors are results here: a dispatch that nobody waits for any more is not a mistake.
        self._result: asyncio.Future[Combine | TransportError] = link.loop.create_future()

    @property
    def wanted(self) -> bool:
        return not self._result.done()

    async def wait(self, timeout_s: float) -> Combine:
        if not self._result.done():
            await self._wait(timeout_s)
        result = self._result.result()
        if isinstance(result, TransportError):
            raise result
        return result

    async def _wait(self, timeout_s: float) -> None:
        self._link.about_to_wait()
        expiry = self._link.loop.call_later(timeout_s, self._expire, timeout_s)
        try:
            await self._result
        finally:
            expiry.cancel()

    def _expire(self, timeout_s: float) -> None:
        phase = "queue or compute at the peer, or the network on the way back"
        self.finish(self._link.timeout_error(self, timeout_s, phase))

    def abandon(self) -> None:
        """Whatever still arrives is dropped, and frees its slot."""
        self._result.cancel()

    def finish(self, result: Combine | TransportError) -> None:
        if not self._result.done():
            self._result.set_result(result)

    def take(self, rows: slice, partial: torch.Tensor, queue_us: int, compute_us: int) -> None:
        """One chunk's rows, copied out of the slot."""
        if self._partial is None:
            shape = (self.num_tokens, *partial.shape[1:])
            self._partial = torch.empty(shape, dtype=partial.dtype, device=self._device)
        whole = partial.shape[0] == self.num_tokens
        copy_values(self._partial if whole else self._partial[rows], partial)
        self._queue_us = max(self._queue_us, queue_us)
        self._compute_us += compute_us
        self._chunks_left -= 1
        if self._chunks_left == 0:
            self.finish(Combine(self.key, self._partial, self._queue_us, self._compute_us))


@dataclass(slots=True)
class InFlight:
    """A slot's present use."""

    sequence: int
    pending: Pending
    rows: slice


class ChunkedLink(ExpertLink):
    """See the module's docstring. `chunk_tokens` is the most tokens one `_post` is given."""

    def __init__(self, peer: str, transport: str, spec: LinkSpec, chunk_tokens: int) -> None:
        self.peer = peer
        self.transport = transport
        self.spec = spec
        self.counters = LinkCounters()
        self._layout = SlotLayout(spec)
        self._chunk_tokens = chunk_tokens
        self._slots = SlotPool(spec.slot_count)
        self._in_flight: dict[int, InFlight] = {}
        self._sequence = 0
        self._lost_because: str | None = None
        self.loop = asyncio.get_running_loop()

    @property
    def lost_because(self) -> str | None:
        return self._lost_because

    @abstractmethod
    async def _post(self, slot: int, sequence: int, chunk: Dispatch, deadline: float) -> None:
        """Send one chunk; returns when its bytes have left. `deadline` is in the loop's time.
        Raises a TransportError, after which the slot stays owned until an answer comes."""

    def about_to_wait(self) -> None:
        """A waiter is going to sleep."""

    async def dispatch(self, dispatch: Dispatch, timeout_s: float) -> Pending:
        check_shapes(dispatch, self.spec)
        deadline = self.loop.time() + timeout_s
        parts = split(dispatch, self._chunk_tokens)
        pending = Pending(self, dispatch, len(parts))
        try:
            for rows, part in parts:
                await self._send(pending, part, rows, deadline)
        except BaseException:
            pending.abandon()
            raise
        return pending

    async def _send(self, pending: Pending, part: Dispatch, rows: slice, deadline: float) -> None:
        slot = await self._take_slot(part, deadline)
        self._sequence += 1
        self._in_flight[slot] = InFlight(self._sequence, pending, rows)
        await self._post(slot, self._sequence, part, deadline)
        payload = self._layout.payload_bytes(part.num_tokens)
        self.counters.dispatches += 1
        self.counters.dispatch_bytes += payload
        self.counters.routing_bytes += 2 * self._layout.index_bytes(part.num_tokens)

    async def _take_slot(self, part: Dispatch, deadline: float) -> int:
        if self._lost_because is not None:
            raise self._lost_error(part)
        slot = self._slots.take()
        if slot is not None:
            return slot
        started = self.loop.time()
        try:
            return await self._slots.wait(deadline - started)
        except TimeoutError:
            phase = f"queue: all {self.spec.slot_count} slots are in flight"
            raise self.timeout_error(part, self.loop.time() - started, phase) from None

    def _claim(self, slot: int, sequence: int) -> InFlight | None:
        """Whom an answer belongs to; None, and counted, when it matches nothing."""
        found = self._in_flight.get(slot)
        if found is None or found.sequence != sequence:
            self.counters.dropped += 1
            return None
        del self._in_flight[slot]
        return found

    def _answered(
        self, slot: int, sequence: int, partial: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:
        """`partial` [num_tokens, hidden_size] arrived; it is copied before this returns."""
        found = self._claim(slot, sequence)
        if found is None:
            return
        rows = found.rows
        if not found.pending.wanted:
            self.counters.dropped += 1
        elif partial.shape[0] != rows.stop - rows.start:
            self._failed_with(found, f"answered {partial.shape[0]} rows", "FAILED_PRECONDITION")
        else:
            found.pending.take(rows, partial, queue_us, compute_us)
            self.counters.combine_bytes += self._layout.payload_bytes(partial.shape[0])
        self._slots.give(slot)

    def _failed(self, slot: int, sequence: int, code: str, message: str) -> None:
        """The peer could not do it; the slot is free again."""
        found = self._claim(slot, sequence)
        if found is not None:
            self._failed_with(found, message, code)
            self._slots.give(slot)

    def _failed_with(self, found: InFlight, message: str, code: str) -> None:
        what = self._describe(found.pending)
        found.pending.finish(PeerFailedError(f"{self.peer}: {what}: {message}", code))

    def _lost(self, reason: str) -> None:
        """The peer is gone: everything outstanding fails, and so does all that comes later."""
        if self._lost_because is not None:
            return
        self._lost_because = reason
        for found in self._in_flight.values():
            found.pending.finish(self._lost_error(found.pending))
        self._in_flight.clear()
        self._slots.fail(PeerLostError(f"{self.peer} is gone ({reason}), while waiting for a slot"))

    def _lost_error(self, what: Named) -> PeerLostError:
        return PeerLostError(f"{self.peer} is gone ({self._lost_because}): {self._describe(what)}")

    def timeout_error(self, what: Named, waited_s: float, phase: str) -> PeerTimeoutError:
        return PeerTimeoutError(
            f"{self.peer}: no progress in {waited_s:.3g} s: {self._describe(what)}, phase: {phase}"
        )

    def _describe(self, what: Named) -> str:
        size = self._layout.payload_bytes(what.num_tokens)
        return f"layer {what.key.layer_id}, {what.num_tokens} tokens, {size} bytes"
