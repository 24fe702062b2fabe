"""The expert's end of all exchanges: `ExpertService.Exchange`, one stream per attention process.

Knows which attention processes are connected and greets new ones. Knows no tensor: what a stream
carries is its session's business.
"""

import asyncio
from typing import Any

import grpc
import grpc.aio

from moe_core.errors import EpserveError, ProtocolError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.pb.epserve.v1 import expert_pb2_grpc as rpc
from moe_core.service.grpc_channel import status_code
from moe_core.transport.base import DispatchHandler, Identity, LinkSpec, TransportOptions
from moe_core.transport.grpc_link import GrpcSession
from moe_core.transport.handshake import Agreement, accept_hello
from moe_core.transport.session import PeerSession
from moe_core.transport.stream import MessageWriter

Context = grpc.aio.ServicerContext[pb.ExchangeRequest, pb.ExchangeResponse]


class ExchangeServicer(rpc.ExpertServiceServicer):
    """Add it to a grpc.aio server; build and use it on the server's event loop."""

    def __init__(
        self,
        handler: DispatchHandler,
        spec: LinkSpec,
        identity: Identity,
        options: TransportOptions,
    ) -> None:
        self._handler = handler
        self._spec = spec
        self._identity = identity
        self._options = options
        self._exchanges: dict[int, _Exchange] = {}  # by attention rank

    @property
    def peers(self) -> tuple[PeerSession, ...]:
        """The connected attention processes, by rank: `peer`, `transport`, `counters`."""
        return tuple(self._exchanges[rank].session for rank in sorted(self._exchanges))

    async def Exchange(self, request_iterator: Any, context: Context) -> None:  # noqa: ANN401
        try:
            await self._exchange(context)
        except EpserveError as error:
            await context.abort(status_code(error), str(error))

    async def _exchange(self, context: Context) -> None:
        hello = await self._read_hello(context)
        agreement = accept_hello(hello, self._spec, self._identity, self._supported())
        exchange = self._open(hello, agreement, context)
        try:
            await exchange.run(self._welcome(agreement, exchange))
        finally:
            if self._exchanges.get(hello.attn_rank) is exchange:
                del self._exchanges[hello.attn_rank]

    async def _read_hello(self, context: Context) -> pb.Hello:
        try:
            async with asyncio.timeout(self._options.connect_timeout_s):
                first = await context.read()
        except TimeoutError:
            raise ProtocolError("no hello came") from None
        if not isinstance(first, pb.ExchangeRequest) or first.WhichOneof("kind") != "hello":
            raise ProtocolError("the first message of an exchange must be a hello")
        hello: pb.Hello = first.hello
        return hello

    def _supported(self) -> dict[str, str]:
        return {"grpc": ""}

    def _open(self, hello: pb.Hello, agreement: Agreement, context: Context) -> "_Exchange":
        old = self._exchanges.pop(hello.attn_rank, None)
        if old is not None:
            old.stop(f"replaced by instance {hello.instance_epoch} of attention {hello.attn_rank}")
        peer = f"attn {hello.attn_rank} ({context.peer()})"
        exchange = _Exchange(context)
        exchange.session = GrpcSession(peer, self._spec, self._handler, exchange.writer)
        self._exchanges[hello.attn_rank] = exchange
        return exchange

    def _welcome(self, agreement: Agreement, exchange: "_Exchange") -> pb.Welcome:
        return pb.Welcome(
            protocol_version=agreement.version,
            transport=agreement.transport,
            transport_reason=agreement.reason,
            instance_epoch=self._identity.instance_epoch,
        )

    async def close(self) -> None:
        """End all exchanges; the peers see UNAVAILABLE."""
        for exchange in tuple(self._exchanges.values()):
            exchange.stop(f"expert {self._identity.rank} is closing")
        while self._exchanges:
            await asyncio.sleep(0.001)


class _Exchange:
    """One stream while it lives."""

    session: GrpcSession

    def __init__(self, context: Context) -> None:
        self._context = context
        self.writer: MessageWriter[pb.ExchangeResponse] = MessageWriter(context.write)
        self._stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def stop(self, reason: str) -> None:
        if not self._stopped.done():
            self._stopped.set_result(reason)

    async def run(self, welcome: pb.Welcome) -> None:
        """Until the peer ends the stream, breaks the contract (ProtocolError) or `stop`."""
        await self._context.write(pb.ExchangeResponse(welcome=welcome))
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self.writer.run())
        try:
            await asyncio.wait((reader, self._stopped), return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                await reader
            else:
                await self._context.abort(grpc.StatusCode.UNAVAILABLE, self._stopped.result())
        finally:
            self.session.gone()
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self) -> None:
        while isinstance(message := await self._context.read(), pb.ExchangeRequest):
            self.session.received(message)
