"""What the attention's end of every link has in common: slots, chunks, late answers.

Knows when a slot is free, how a batch is cut into chunks, and whose an answer is.
Knows no wire: a subclass sends one chunk (`_post`), says when it has left (`departed`) and reports
what came back (`_answered`, `_failed`, `_lost`).

Invariant: a slot is in exactly one of `SlotPool`, `_in_flight` and a `Pending` that holds its
answer. It goes back to the pool only when the peer's answer to its last sequence is here, so what a
waiter does in the meantime (be cancelled, time out) can neither leak a slot nor free it early.
"""

import asyncio
from abc import abstractmethod
from dataclasses import dataclass

import torch

from moe_core.errors import PeerFailedError, PeerLostError, PeerTimeoutError
from moe_core.transport.base import Dispatch, ExpertLink, LinkCounters, LinkSpec
from moe_core.transport.chunks import check_shapes, split
from moe_core.transport.layout import SlotLayout
from moe_core.transport.pending import Named, Pending
from moe_core.transport.slots import SlotPool


@dataclass(slots=True)
class InFlight:
    """A slot's present use: which rows of `pending` (None: all), of which there are num_tokens."""

    sequence: int
    pending: Pending
    rows: slice | None
    num_tokens: int


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
    def _post(self, slot: int, sequence: int, chunk: Dispatch, num_tokens: int) -> None:
        """Start to send one chunk; its tensors may be reused when this returns."""

    @abstractmethod
    async def departed(self, slot: int, what: Named, deadline: float) -> None:
        """Until the bytes posted from `slot` have left. `deadline` is in the loop's time. Raises
        a TransportError, after which the slot stays owned until an answer comes."""

    @abstractmethod
    async def _phase_of(self, slot: int, sequence: int) -> str:
        """Where an exchange is that was not answered in time, within ASK_S."""

    async def phase_of(self, pending: Pending) -> str:
        """See PendingHost. Of several chunks the one that was sent first."""
        waiting = (
            (found.sequence, slot)
            for slot, found in self._in_flight.items()
            if found.pending is pending
        )
        sequence, slot = min(waiting)
        return await self._phase_of(slot, sequence)

    def look_for(self, pending: Pending) -> None:
        """A waiter is about to sleep: a last chance to see its answer."""

    def try_dispatch(self, dispatch: Dispatch) -> Pending | None:
        num_tokens = check_shapes(dispatch, self.spec)
        if num_tokens > self._chunk_tokens or self._lost_because is not None:
            return None
        slot = self._slots.take()
        if slot is None:
            return None
        pending = Pending(self, dispatch.key, num_tokens, 1)
        self._start(slot, pending, dispatch, num_tokens, None)
        return pending

    async def dispatch(self, dispatch: Dispatch, timeout_s: float) -> Pending:
        pending = self.try_dispatch(dispatch)
        if pending is None:
            return await self._dispatch_chunks(dispatch, self.loop.time() + timeout_s)
        try:
            await pending.left(timeout_s)
        except BaseException:
            pending.release()
            raise
        return pending

    async def _dispatch_chunks(self, dispatch: Dispatch, deadline: float) -> Pending:
        parts = split(dispatch, self._chunk_tokens)
        pending = Pending(self, dispatch.key, dispatch.num_tokens, len(parts))
        try:
            for rows, part in parts:
                slot = await self._take_slot(part, deadline)
                self._start(slot, pending, part, part.num_tokens, rows)
                await self.departed(slot, part, deadline)
        except PeerLostError as error:
            if pending.answered_chunks() is None:
                pending.release()
                raise
            pending.finish(error)  # the result says so; some of it is there
        except BaseException:
            pending.release()
            raise
        return pending

    def _start(
        self, slot: int, pending: Pending, part: Dispatch, num_tokens: int, rows: slice | None
    ) -> None:
        self._sequence += 1
        pending.slot = slot
        self._in_flight[slot] = InFlight(self._sequence, pending, rows, num_tokens)
        self._post(slot, self._sequence, part, num_tokens)
        counters = self.counters
        counters.dispatches += 1
        counters.dispatch_tokens += num_tokens
        counters.dispatch_bytes += self._layout.payload_bytes(num_tokens)
        counters.routing_bytes += 2 * self._layout.index_bytes(num_tokens)

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
        """`partial` [num_tokens, hidden_size] arrived; it stays as it is until the slot is used
        again."""
        found = self._claim(slot, sequence)
        if found is None:
            return
        pending, num_tokens = found.pending, partial.shape[0]
        if not pending.wanted:
            self.counters.dropped += 1
        elif num_tokens != found.num_tokens:
            self._failed_with(found, f"answered {num_tokens} rows", "FAILED_PRECONDITION")
        else:
            self.counters.combine_bytes += self._layout.payload_bytes(num_tokens)
            if found.rows is None:
                pending.take(slot, partial, queue_us, compute_us)
                return
            pending.take_part(found.rows, partial, queue_us, compute_us)
        self.give_slot(slot)

    def give_slot(self, slot: int) -> None:
        self._slots.give(slot)

    def is_owed(self, pending: Pending) -> bool:
        return any(found.pending is pending for found in self._in_flight.values())

    def _failed(self, slot: int, sequence: int, code: str, message: str) -> None:
        """The peer could not do it; the slot is free again."""
        found = self._claim(slot, sequence)
        if found is not None:
            self._failed_with(found, message, code)
            self.give_slot(slot)

    def _failed_with(self, found: InFlight, message: str, code: str) -> None:
        what = self._describe(found.pending)
        found.pending.finish(PeerFailedError(f"{self.peer}: {what}: {message}", code))

    def lose(self, reason: str) -> None:
        self._lost(reason)

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
