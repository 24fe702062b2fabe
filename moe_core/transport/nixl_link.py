"""The attention's end of a NIXL link: dispatches out by one-sided writes, combines in likewise.

Knows its two memories' layout and the tags. The gRPC stream carries failures, doorbells of peers
on other hosts, and the news of a peer's end.
"""

import asyncio

from moe_core.errors import PeerLostError, ProtocolError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.transport.base import Dispatch, Identity, LinkSpec
from moe_core.transport.endpoint import BELL_SPIN_S, NixlEndpoint
from moe_core.transport.flow import ChunkedLink
from moe_core.transport.layout import SlotLayout, SlotMemory
from moe_core.transport.nixl_path import NixlPath
from moe_core.transport.pending import Named, Pending
from moe_core.transport.stream import ExchangeStream
from moe_core.transport.tags import (
    COMBINE,
    DISPATCH,
    PROBE,
    pack_dispatch,
    pack_probe,
    read_tag,
    read_times,
)


def attention_path(endpoint: NixlEndpoint, spec: LinkSpec, peer: str) -> NixlPath:
    layout = SlotLayout(spec)
    incoming, outgoing = layout.combine_slot_bytes, layout.dispatch_slot_bytes
    return NixlPath(endpoint, peer, spec.slot_count, incoming, outgoing)


class NixlLink(ChunkedLink):
    """Owns `path` and `stream`, and `endpoint` too if `owns_endpoint`."""

    def __init__(
        self,
        stream: ExchangeStream,
        spec: LinkSpec,
        identity: Identity,
        endpoint: NixlEndpoint,
        path: NixlPath,
        *,
        owns_endpoint: bool,
    ) -> None:
        super().__init__(stream.peer, "nixl", spec, spec.slot_tokens)
        self._stream = stream
        self._epoch = identity.instance_epoch
        self._endpoint = endpoint
        self._owns_endpoint = owns_endpoint
        self._path = path
        self._out = SlotMemory(path.outgoing, spec, self._layout.dispatch_slot_bytes)
        self._in = SlotMemory(path.incoming, spec, self._layout.combine_slot_bytes)
        self._probed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed = False

    async def start(self, grant: pb.NixlGrant, timeout_s: float) -> None:
        """Open the path and prove it both ways; this also sets the connection up, which the first
        dispatch would otherwise wait for. Raises TransportError, TimeoutError."""
        self._path.open(grant, self._ring_stream, self.counters)
        self._endpoint.attach(self._path.sender, self)
        self._stream.start(self._received, self._lost)
        deadline = asyncio.get_running_loop().time() + timeout_s
        note = pack_probe(self._path.link_id, self._epoch)
        self._path.write(0, 0, note)
        await self._written(0, deadline)
        async with asyncio.timeout_at(deadline):
            await self._probed
        if self._lost_because is not None:
            raise PeerLostError(f"{self.peer} is gone ({self._lost_because}), while connecting")

    def _ring_stream(self) -> None:
        self._stream.writer.send(pb.ExchangeRequest(doorbell=pb.Doorbell()))

    @property
    def busy(self) -> bool:
        return bool(self._in_flight)

    def look_for(self, pending: Pending) -> None:
        self._endpoint.poll_while(pending)

    def _post(self, slot: int, sequence: int, chunk: Dispatch, num_tokens: int) -> None:
        key, hidden_states, physical_ids, topk_weights = chunk
        path, out = self._path, self._out
        out.store_payload(slot, hidden_states, num_tokens)
        num_bytes = out.store_routing(slot, physical_ids, topk_weights, num_tokens)
        tag = (DISPATCH, slot, num_tokens, path.link_id, self._epoch, sequence)
        path.write(slot, num_bytes, pack_dispatch(tag, key))

    async def departed(self, slot: int, what: Named, deadline: float) -> None:
        if not self._path.unfinished and self._path.failure is None:
            return
        started = asyncio.get_running_loop().time()
        try:
            await self._written(slot, deadline)
        except TimeoutError:
            waited = asyncio.get_running_loop().time() - started
            raise self.timeout_error(what, waited, "network (the write is not done)") from None
        except PeerLostError:
            raise self._lost_error(what) from None

    async def _phase_of(self, slot: int, sequence: int) -> str:
        return await self._stream.phase_of(slot, sequence)

    async def _written(self, slot: int, deadline: float) -> None:
        try:
            await self._path.written(slot, deadline)
        except self._endpoint.agent.failures as error:
            self._lost(f"NIXL says {error}")
            raise PeerLostError(f"{self.peer} is gone (NIXL says {error})") from None

    def received(self, note: bytes) -> None:
        """A notification of the peer's agent; its data lies in the slot that it names."""
        kind, slot, num_tokens, link_id, epoch, sequence = read_tag(note)
        ours = link_id == self._path.link_id and epoch == self._epoch
        spec = self.spec
        if ours and kind == COMBINE and slot < spec.slot_count and num_tokens <= spec.slot_tokens:
            queue_us, compute_us = read_times(note)
            partial = self._in.payload(slot, num_tokens)
            self._answered(slot, sequence, partial, queue_us, compute_us)
        elif ours and kind == PROBE:
            self._end_probe()
        else:
            self.counters.dropped += 1

    def _end_probe(self) -> None:
        if not self._probed.done():
            self._probed.set_result(None)

    def _received(self, message: pb.ExchangeResponse) -> None:
        kind = message.WhichOneof("kind")
        if kind == "doorbell":
            self._endpoint.spin(BELL_SPIN_S)
        elif kind == "failure":
            tag = message.failure.tag
            self._failed(tag.slot, tag.sequence, message.failure.code, message.failure.message)
        else:
            raise ProtocolError(f"{self.peer} sent {kind} on the stream of a NIXL link")

    def _lost(self, reason: str) -> None:
        super()._lost(reason)
        self._path.give_up(PeerLostError(f"{self.peer} is gone ({self._lost_because})"))
        self._end_probe()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._stream.close(in_order=not self._path.unfinished)
        self._lost("closed on this side")
        self._endpoint.detach(self._path.sender, self)
        self._path.close(in_order=self._stream.ended_in_order)
        if self._owns_endpoint:
            self._endpoint.close()
