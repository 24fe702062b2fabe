"""The expert's end of a NIXL link: dispatches arrive in slots, combines leave by writes.

Knows its two memories' layout and the tags, and checks what a tag declares before it looks at the
slot. Knows nothing of what the handler does.
"""

import asyncio
from collections.abc import Callable

import torch

from moe_core.errors import EpserveError, PeerLostError, ProtocolError, TransportError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.transport.base import Dispatch, DispatchHandler, LinkSpec
from moe_core.transport.endpoint import BELL_SPIN_S, NixlEndpoint
from moe_core.transport.grpc_link import failure_response
from moe_core.transport.layout import SlotLayout, SlotMemory
from moe_core.transport.nixl_path import NixlPath
from moe_core.transport.session import PeerSession, SlotReply
from moe_core.transport.stream import MessageWriter
from moe_core.transport.tags import (
    COMBINE,
    DISPATCH,
    PROBE,
    pack_combine,
    pack_probe,
    read_key,
    read_tag,
)

FINISH_TIMEOUT_S = 1.0


class NixlSession(PeerSession):
    transport = "nixl"

    def __init__(
        self,
        peer: str,
        spec: LinkSpec,
        handler: DispatchHandler,
        writer: MessageWriter[pb.ExchangeResponse],
        endpoint: NixlEndpoint,
        hello: pb.Hello,
        on_error: Callable[[TransportError], None],
    ) -> None:
        """Raises TransportError when the peer's grant or the retired memory does not allow it.
        `on_error` is told what ends the exchange outside of `received_message`."""
        super().__init__(peer, spec, handler)
        layout = SlotLayout(spec)
        incoming, outgoing = layout.dispatch_slot_bytes, layout.combine_slot_bytes
        self._writer = writer
        self._endpoint = endpoint
        self._on_error = on_error
        self._epoch = hello.instance_epoch
        self._path = NixlPath(endpoint, peer, spec.slot_count, incoming, outgoing)
        self._in = SlotMemory(self._path.incoming, spec, incoming)
        self._out = SlotMemory(self._path.outgoing, spec, outgoing)
        self.grant = self._path.grant(hello.nixl.link_id)
        try:
            self._path.open(hello.nixl, self._ring_stream, self.counters)
        except TransportError:
            self._path.close(in_order=True)
            raise
        endpoint.attach(self._path.sender, self)

    def _ring_stream(self) -> None:
        self._writer.send(pb.ExchangeResponse(doorbell=pb.Doorbell()))

    @property
    def busy(self) -> bool:
        return bool(self._replies)

    def received_message(self, message: pb.ExchangeRequest) -> None:
        if message.WhichOneof("kind") != "doorbell":
            raise self._violation(f"{message.WhichOneof('kind')} on the stream of a NIXL link")
        self._endpoint.spin(BELL_SPIN_S)

    def received(self, note: bytes) -> None:
        """A notification of the peer's agent; its data lies in the slot that it names."""
        kind, slot, num_tokens, link_id, epoch, sequence = read_tag(note)
        if self._gone or link_id != self._path.link_id or epoch != self._epoch:
            self.counters.dropped += 1
        elif kind == DISPATCH:
            try:
                self._receive_dispatch(slot, num_tokens, sequence, note)
            except ProtocolError as error:
                self._on_error(error)
        elif kind == PROBE:
            self._path.write(0, 0, pack_probe(link_id, epoch))
        else:
            self.counters.dropped += 1

    def _receive_dispatch(self, slot: int, num_tokens: int, sequence: int, note: bytes) -> None:
        if slot < self.spec.slot_count and sequence <= self._arrived[slot]:
            self.counters.dropped += 1
            return
        self.check_declared(slot, num_tokens)
        key = read_key(note)
        if key is None:
            raise self._violation(f"a dispatch header of {len(note)} bytes")
        hidden_states = self._in.payload(slot, num_tokens)
        ids, weights = self._in.routing(slot, num_tokens)
        self.deliver(slot, sequence, Dispatch(key, hidden_states, ids, weights))

    def _send_combine(
        self, reply: SlotReply, partial: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:
        path, slot, num_tokens = self._path, reply.slot, reply.num_tokens
        num_bytes = self._out.store_payload(slot, partial, num_tokens)
        tag = (COMBINE, slot, num_tokens, path.link_id, self._epoch, reply.sequence)
        path.write(slot, num_bytes, pack_combine(tag, queue_us, compute_us))
        if path.failure is not None:
            self._on_error(PeerLostError(f"{self.peer} is gone (NIXL says {self._path.failure})"))

    def _send_failure(self, reply: SlotReply, error: EpserveError) -> None:
        self._writer.send(failure_response(reply, error))

    async def finish(self) -> None:
        """Until our writes are done, for the end of the stream promises that they are. Raises
        TransportError if they are not in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + FINISH_TIMEOUT_S
        while self._path.unfinished:
            if loop.time() > deadline or self._path.failure is not None:
                raise PeerLostError(f"{self.peer} has left with writes to it unfinished")
            await asyncio.sleep(0.001)

    def close(self, *, in_order: bool) -> None:
        super().close(in_order=in_order)
        self._endpoint.detach(self._path.sender, self)
        self._path.close(in_order=in_order)
