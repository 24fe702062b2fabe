"""The portable transport: tensors inside the messages of the Exchange stream, both ends.

Knows expert.proto's dispatch, combine and failure. Knows no shared memory and no agent.
"""

import asyncio

import torch

from moe_core.errors import EpserveError, ProtocolError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.service.grpc_channel import MAX_MESSAGE_BYTES
from moe_core.transport.base import Dispatch, DispatchHandler, LinkSpec
from moe_core.transport.flow import ChunkedLink
from moe_core.transport.layout import SlotLayout
from moe_core.transport.pending import Named
from moe_core.transport.session import PeerSession, SlotReply
from moe_core.transport.stream import ExchangeStream, MessageWriter
from moe_core.transport.wire import (
    bytes_tensor,
    check_length,
    dispatch_message,
    read_dispatch,
    tensor_bytes,
)

MESSAGE_HEADROOM = 64 * 1024


def chunk_tokens(spec: LinkSpec) -> int:
    """A slot, or what fits into one gRPC message if that is less."""
    bytes_per_token = SlotLayout(spec).dispatch_bytes(1)
    fitting = (MAX_MESSAGE_BYTES - MESSAGE_HEADROOM) // bytes_per_token
    return max(1, min(spec.slot_tokens, fitting))


class GrpcLink(ChunkedLink):
    def __init__(self, stream: ExchangeStream, spec: LinkSpec) -> None:
        super().__init__(stream.peer, "grpc", spec, chunk_tokens(spec))
        self._stream = stream
        self._sent: dict[int, asyncio.Future[bool]] = {}
        stream.start(self._received, self._lost)

    def _post(self, slot: int, sequence: int, chunk: Dispatch, num_tokens: int) -> None:
        message = dispatch_message(slot, sequence, chunk)
        self.counters.stream_tensor_bytes += (
            len(message.hidden_states) + len(message.physical_ids) + len(message.topk_weights)
        )
        self._stream.writer.send(pb.ExchangeRequest(dispatch=message))
        self._sent[slot] = self._stream.writer.sent()

    async def departed(self, slot: int, what: Named, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout_at(deadline):
                sent = await asyncio.shield(self._sent[slot])
        except TimeoutError:
            raise self.timeout_error(what, loop.time() - started, "network") from None
        if not sent:
            self._lost("the stream ended")
            raise self._lost_error(what)

    async def _phase_of(self, slot: int, sequence: int) -> str:
        return await self._stream.phase_of(slot, sequence)

    def _received(self, message: pb.ExchangeResponse) -> None:
        kind = message.WhichOneof("kind")
        if kind == "combine":
            self._receive_combine(message.combine)
        elif kind == "failure":
            tag = message.failure.tag
            self._failed(tag.slot, tag.sequence, message.failure.code, message.failure.message)
        elif kind != "doorbell":
            raise ProtocolError(f"{self.peer} sent {kind} where combines are expected")

    def _receive_combine(self, message: pb.CombineMessage) -> None:
        num_tokens = message.num_tokens
        check_length("partial", message.partial, self._layout.payload_bytes(num_tokens), num_tokens)
        self.counters.stream_tensor_bytes += len(message.partial)
        spec = self.spec
        partial = bytes_tensor(message.partial, spec.dtype, num_tokens, spec.hidden_size)
        tag = message.tag
        self._answered(tag.slot, tag.sequence, partial, message.queue_us, message.compute_us)

    def _lost(self, reason: str) -> None:
        super()._lost(reason)
        for mark in self._sent.values():
            if not mark.done():
                mark.set_result(False)

    async def close(self) -> None:
        await self._stream.close()
        self._lost("closed on this side")


class GrpcSession(PeerSession):
    transport = "grpc"

    def __init__(
        self,
        peer: str,
        spec: LinkSpec,
        handler: DispatchHandler,
        writer: MessageWriter[pb.ExchangeResponse],
    ) -> None:
        super().__init__(peer, spec, handler)
        self._writer = writer

    def received_message(self, message: pb.ExchangeRequest) -> None:
        """Raises ProtocolError for what the contract does not allow."""
        kind = message.WhichOneof("kind")
        if kind != "dispatch":
            raise self._violation(f"{kind} where dispatches are expected")
        dispatch, tag = message.dispatch, message.dispatch.tag
        self.check_declared(tag.slot, dispatch.num_tokens)
        tensors = read_dispatch(dispatch, self.spec)
        self.counters.stream_tensor_bytes += (
            len(dispatch.hidden_states) + len(dispatch.physical_ids) + len(dispatch.topk_weights)
        )
        self.deliver(tag.slot, tag.sequence, tensors)

    def _send_combine(
        self, reply: SlotReply, partial: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:
        data = tensor_bytes(partial)
        self.counters.stream_tensor_bytes += len(data)
        message = pb.CombineMessage(
            tag=pb.Tag(slot=reply.slot, sequence=reply.sequence),
            num_tokens=reply.num_tokens,
            partial=data,
            queue_us=queue_us,
            compute_us=compute_us,
        )
        self._writer.send(pb.ExchangeResponse(combine=message))

    def _send_failure(self, reply: SlotReply, error: EpserveError) -> None:
        self._writer.send(failure_response(reply, error))


def failure_response(reply: SlotReply, error: EpserveError) -> pb.ExchangeResponse:
    return pb.ExchangeResponse(
        failure=pb.DispatchFailure(
            tag=pb.Tag(slot=reply.slot, sequence=reply.sequence),
            code=error.code,
            message=str(error),
        )
    )
