"""The expert's end of all exchanges: `ExpertService.Exchange`, one stream per attention process.

Knows which attention processes are connected and greets new ones. Knows no tensor: what a stream
carries is its session's business.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc.aio

from moe_core.errors import EpserveError, PeerLostError, ProtocolError, TransportError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.pb.epserve.v1 import expert_pb2_grpc as rpc
from moe_core.service.grpc_channel import status_code
from moe_core.transport.base import DispatchHandler, Identity, LinkSpec, TransportOptions
from moe_core.transport.choice import open_endpoint
from moe_core.transport.endpoint import NixlEndpoint
from moe_core.transport.grpc_link import GrpcSession
from moe_core.transport.handshake import Agreement, accept_hello
from moe_core.transport.nixl_session import NixlSession
from moe_core.transport.session import PeerSession
from moe_core.transport.stream import MessageWriter

logger = logging.getLogger(__name__)
CLOSE_TIMEOUT_S = 5.0

Context = grpc.aio.ServicerContext[pb.ExchangeRequest, pb.ExchangeResponse]


class ExchangeServicer(rpc.ExpertServiceServicer):
    """Add it to a grpc.aio server; build and use it on the server's event loop."""

    def __init__(
        self,
        handler: DispatchHandler,
        spec: LinkSpec,
        identity: Identity,
        options: TransportOptions,
        attention_world: Callable[[], int] | None = None,
    ) -> None:
        """`attention_world` says how many attention processes the cluster has now; without it a
        caller's own word is taken. Raises ConfigError when `options` ask for nixl and there is
        none."""
        self._attention_world = attention_world
        self._handler = handler
        self._spec = spec
        self._identity = identity
        self._options = options
        self._exchanges: dict[int, _Exchange] = {}  # the current one of each attention rank
        self._running: set[_Exchange] = set()
        self._endpoint, self._nixl_missing = open_endpoint(identity, options)

    @property
    def peers(self) -> tuple[PeerSession, ...]:
        """The connected attention processes, by rank: `peer`, `transport`, `counters`."""
        return tuple(self._exchanges[rank].session for rank in sorted(self._exchanges))

    @property
    def endpoint(self) -> NixlEndpoint | None:
        """This process's one, until `close`; None where there is no NIXL, or none is wanted."""
        return self._endpoint

    @property
    def retired_bytes(self) -> int:
        """Memory held back for peers that left without a word and may still be alive."""
        return 0 if self._endpoint is None else self._endpoint.retired.num_bytes

    async def Exchange(self, request_iterator: Any, context: Context) -> None:  # noqa: ANN401
        try:
            await self._exchange(context)
        except EpserveError as error:
            await context.abort(status_code(error), str(error))

    async def Locate(self, request: pb.LocateRequest, context: Any) -> pb.LocateResponse:  # noqa: ANN401
        exchange = self._exchanges.get(request.attn_rank)
        if exchange is None or exchange.session.source_epoch != request.instance_epoch:
            return pb.LocateResponse()
        tag = request.tag
        return pb.LocateResponse(where=exchange.session.where(tag.slot, tag.sequence))

    async def _exchange(self, context: Context) -> None:
        hello = await self._read_hello(context)
        world = None if self._attention_world is None else self._attention_world()
        agreement = accept_hello(hello, self._spec, self._identity, self._supported(), world)
        exchange = self._open(hello, agreement, context)
        self._running.add(exchange)
        try:
            await exchange.run(self._welcome(agreement, exchange))
        finally:
            self._running.discard(exchange)
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
        wanted = self._options.transport
        excluded = f"the expert side was told to use {wanted} only"
        grpc_missing = "" if wanted in ("auto", "grpc") else excluded
        nixl_missing = excluded if wanted == "grpc" else self._nixl_missing
        return {"nixl": nixl_missing, "grpc": grpc_missing}

    def _open(self, hello: pb.Hello, agreement: Agreement, context: Context) -> "_Exchange":
        old = self._exchanges.pop(hello.attn_rank, None)
        if old is not None:
            old.stop(f"replaced by instance {hello.instance_epoch} of attention {hello.attn_rank}")
        peer = f"attn {hello.attn_rank} ({context.peer()})"
        exchange = _Exchange(context)
        exchange.session = self._session(peer, hello, agreement, exchange)
        exchange.session.source_epoch = hello.instance_epoch
        self._exchanges[hello.attn_rank] = exchange
        logger.info("%s: transport %s (%s)", peer, agreement.transport, agreement.reason)
        return exchange

    def _session(
        self, peer: str, hello: pb.Hello, agreement: Agreement, exchange: "_Exchange"
    ) -> GrpcSession | NixlSession:
        handler, writer = self._handler, exchange.writer
        if agreement.transport == "grpc" or self._endpoint is None:
            return GrpcSession(peer, self._spec, handler, writer)
        endpoint, on_error = self._endpoint, exchange.fail
        return NixlSession(peer, self._spec, handler, writer, endpoint, hello, on_error)

    def _welcome(self, agreement: Agreement, exchange: "_Exchange") -> pb.Welcome:
        session = exchange.session
        return pb.Welcome(
            protocol_version=agreement.version,
            transport=agreement.transport,
            transport_reason=agreement.reason,
            instance_epoch=self._identity.instance_epoch,
            nixl=session.grant if isinstance(session, NixlSession) else None,
        )

    async def close(self) -> None:
        """End all exchanges; the peers see UNAVAILABLE. Waits for their streams to end."""
        for exchange in tuple(self._exchanges.values()):
            exchange.stop(f"expert {self._identity.rank} is closing")
        running = [exchange.ended.wait() for exchange in self._running]
        if running:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*running)
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None


class _Exchange:
    """One stream while it lives."""

    session: GrpcSession | NixlSession

    def __init__(self, context: Context) -> None:
        self._context = context
        self.writer: MessageWriter[pb.ExchangeResponse] = MessageWriter(context.write)
        self.ended = asyncio.Event()
        self._error: asyncio.Future[TransportError] = asyncio.get_running_loop().create_future()

    def stop(self, reason: str) -> None:
        self.fail(PeerLostError(reason))

    def fail(self, error: TransportError) -> None:
        if not self._error.done():
            self._error.set_result(error)

    async def run(self, welcome: pb.Welcome) -> None:
        """Until the peer ends the stream in order. Raises TransportError when the peer breaks the
        contract, or with what `fail` and `stop` were given."""
        tasks: list[asyncio.Task[None]] = []
        in_order = False
        try:
            await self._context.write(pb.ExchangeResponse(welcome=welcome))
            tasks = [asyncio.create_task(self._read()), asyncio.create_task(self.writer.run())]
            await asyncio.wait((tasks[0], self._error), return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise self._error.result()
            await tasks[0]
            in_order = True
            await self.session.finish()
        finally:
            self.session.close(in_order=in_order)
            for task in tasks:
                task.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:  # gRPC may cancel this here, because the peer has gone too
                self.ended.set()

    async def _read(self) -> None:
        while isinstance(message := await self._context.read(), pb.ExchangeRequest):
            self.session.received_message(message)
