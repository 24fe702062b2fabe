"""What the expert's end of every link has in common: one attention process, its dispatches.

Knows which slots are in use, hands dispatches to the handler and its answers to the wire. Knows no
wire: a subclass sends (`_send_combine`, `_send_failure`). Knows nothing of what the handler does.
"""

import asyncio
from abc import ABC, abstractmethod

import torch

from moe_core.errors import EpserveError, ProtocolError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.transport.base import (
    Dispatch,
    DispatchHandler,
    DispatchKey,
    LinkCounters,
    LinkSpec,
)
from moe_core.transport.layout import SlotLayout


class SlotReply:
    """The handler's way to answer the dispatch that occupies `slot`."""

    __slots__ = ("_session", "answered", "key", "num_tokens", "sequence", "slot")

    def __init__(
        self, session: "PeerSession", slot: int, sequence: int, key: DispatchKey, num_tokens: int
    ) -> None:
        self._session = session
        self.slot = slot
        self.sequence = sequence
        self.key = key
        self.num_tokens = num_tokens
        self.answered = False

    @property
    def source_epoch(self) -> int:
        return self._session.source_epoch

    def complete(self, partial: torch.Tensor, queue_us: int, compute_us: int) -> None:
        spec = self._session.spec
        if partial.dtype is not spec.dtype or partial.shape != (self.num_tokens, spec.hidden_size):
            raise ValueError(
                f"partial is {partial.dtype} {list(partial.shape)}; this dispatch wants "
                f"{spec.dtype} {[self.num_tokens, spec.hidden_size]}"
            )
        self._answer()
        self._session.complete(self, partial, queue_us, compute_us)

    def fail(self, error: EpserveError) -> None:
        self._answer()
        self._session.fail(self, error)

    def _answer(self) -> None:
        if self.answered:
            raise RuntimeError(f"dispatch {self.key} was answered twice")
        self.answered = True


class PeerSession(ABC):
    """See the module's docstring. `peer` is how errors name the attention process."""

    transport: str

    def __init__(self, peer: str, spec: LinkSpec, handler: DispatchHandler) -> None:
        self.peer = peer
        self.source_epoch = 0  # instance_epoch of the attention process, once the exchange is open
        self.spec = spec
        self.counters = LinkCounters()
        self._layout = SlotLayout(spec)
        self._handler = handler
        self._replies: dict[int, SlotReply] = {}
        self._arrived = [0] * spec.slot_count  # the newest sequence of each slot
        self._gone = False

    @abstractmethod
    def _send_combine(
        self, reply: SlotReply, partial: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:
        """`partial` has the right shape and dtype, and is copied before this returns."""

    @abstractmethod
    def _send_failure(self, reply: SlotReply, error: EpserveError) -> None: ...

    async def finish(self) -> None:  # noqa: B027 - most sessions have nothing to wait for
        """The peer has ended the exchange in order: until all that was sent to it has arrived."""

    def close(self, *, in_order: bool) -> None:
        """The peer cannot be answered any more; what the handler still answers is dropped.
        `in_order` when the peer has said that it sends nothing more."""
        self._gone = True
        self._replies.clear()

    def complete(
        self, reply: SlotReply, partial: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:
        if self._free(reply):
            self._send_combine(reply, partial, queue_us, compute_us)
            self.counters.combine_bytes += self._layout.payload_bytes(reply.num_tokens)

    def fail(self, reply: SlotReply, error: EpserveError) -> None:
        if self._free(reply):
            self._send_failure(reply, error)

    def _free(self, reply: SlotReply) -> bool:
        if self._gone:
            return False
        del self._replies[reply.slot]
        return True

    def where(self, slot: int, sequence: int) -> "pb.LocateResponse.Where":
        """Where that use of a slot is. Asked between two runs of the handler's."""
        if slot >= self.spec.slot_count or sequence > self._arrived[slot]:
            return pb.LocateResponse.NOT_ARRIVED
        reply = self._replies.get(slot)
        waits = reply is not None and reply.sequence == sequence
        return pb.LocateResponse.QUEUED if waits else pb.LocateResponse.ANSWERED

    def check_declared(self, slot: int, num_tokens: int) -> None:
        """Before anything is allocated or read. Raises ProtocolError naming value and limit."""
        spec = self.spec
        if slot >= spec.slot_count:
            raise self._violation(f"slot {slot} of {spec.slot_count}")
        if slot in self._replies:
            raise self._violation(f"slot {slot} dispatched again before it was answered")
        if num_tokens > spec.slot_tokens:
            raise self._violation(f"{num_tokens} tokens in a slot of {spec.slot_tokens}")

    def _violation(self, what: str) -> ProtocolError:
        return ProtocolError(f"{self.peer} broke the exchange contract: {what}")

    def deliver(self, slot: int, sequence: int, dispatch: Dispatch) -> None:
        """Hand a checked dispatch to the handler. A handler that raises has failed this dispatch;
        what is not an EpserveError is a mistake of ours, and the event loop reports it."""
        num_tokens = dispatch.num_tokens
        reply = SlotReply(self, slot, sequence, dispatch.key, num_tokens)
        self._replies[slot] = reply
        self._arrived[slot] = sequence
        try:
            self._handler(dispatch, reply)
        except EpserveError as error:
            reply.fail(error)
        except Exception as error:
            reply.fail(EpserveError(f"the handler of {dispatch.key} failed: {error}"))
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"dispatch handler failed for {self.peer}", "exception": error}
            )
        counters = self.counters  # after the handler, who may have answered: nobody waits for them
        counters.dispatches += 1
        counters.dispatch_tokens += num_tokens
        counters.dispatch_bytes += self._layout.payload_bytes(num_tokens)
        counters.routing_bytes += 2 * self._layout.index_bytes(num_tokens)
