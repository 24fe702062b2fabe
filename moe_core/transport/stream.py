"""The gRPC stream under a link: ordered writing, reading until it ends, and how it ended.

Knows grpc.aio. Knows neither tensors nor what the messages mean. A stream that ends is how a dead
peer is noticed: a killed process closes its connections, and a frozen one stops answering pings.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from moe_core.errors import PeerLostError, PeerTimeoutError, ProtocolError, TransportError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.pb.epserve.v1 import expert_pb2_grpc as rpc
from moe_core.service.certificates import ServerCheck
from moe_core.service.grpc_channel import open_channel
from moe_core.transport.whereabouts import ASK_S, phase_told

Message = TypeVar("Message")
FAREWELL_TIMEOUT_S = 1.0
STREAM_FAILURES = (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError)


class MessageWriter(Generic[Message]):
    """Writes messages in order, from one task.

    gRPC allows one write at a time, and cancelling a write cancels its whole stream; a queue keeps
    both away from those who send.
    """

    def __init__(self, write: Callable[[Message], Awaitable[None]]) -> None:
        self._write = write
        self._queue: asyncio.Queue[Message | asyncio.Future[bool]] = asyncio.Queue()
        self._tracked: set[asyncio.Future[bool]] = set()

    def send(self, message: Message) -> None:
        self._queue.put_nowait(message)

    def sent(self) -> asyncio.Future[bool]:
        """Done when gRPC has taken everything sent so far: True, or False if it never will."""
        mark: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._tracked.add(mark)
        mark.add_done_callback(self._tracked.discard)
        self._queue.put_nowait(mark)
        return mark

    async def run(self) -> None:
        """Until cancelled or the stream fails, which the stream's reader reports."""
        try:
            with contextlib.suppress(*STREAM_FAILURES):
                while True:
                    await self._next()
        finally:
            for mark in tuple(self._tracked):
                _settle(mark, False)

    async def _next(self) -> None:
        item = await self._queue.get()
        if isinstance(item, asyncio.Future):
            _settle(item, True)
        else:
            await self._write(item)


def _settle(mark: asyncio.Future[bool], result: bool) -> None:
    if not mark.done():
        mark.set_result(result)


class ExchangeStream:
    """The attention's end: a channel of its own, one call on it, and the task that reads it."""

    def __init__(self, address: str, peer: str, security: ServerCheck | None) -> None:
        self.peer = peer
        self._channel = open_channel(address, security)
        stub: Any = rpc.ExpertServiceStub  # generated without annotations
        self._stub = stub(self._channel)
        self._call: Any = self._stub.Exchange(wait_for_ready=True)
        self._hello = pb.Hello()
        self.writer: MessageWriter[pb.ExchangeRequest] = MessageWriter(self._call.write)
        self._tasks: list[asyncio.Task[None]] = []
        self.ended_in_order = False

    async def greet(self, hello: pb.Hello, timeout_s: float) -> pb.Welcome:
        """Raises ProtocolError when the peer refuses, PeerTimeoutError, PeerLostError."""
        self._hello = hello
        try:
            async with asyncio.timeout(timeout_s):
                await self._call.write(pb.ExchangeRequest(hello=hello))
                answer = await self._call.read()
        except TimeoutError:
            raise PeerTimeoutError(
                f"{self.peer}: no welcome within {timeout_s:.3g} s, phase: network (handshake)"
            ) from None
        except STREAM_FAILURES:
            raise await self._refusal() from None
        if not isinstance(answer, pb.ExchangeResponse):  # the end of the stream
            raise await self._refusal()
        if answer.WhichOneof("kind") != "welcome":
            raise ProtocolError(f"{self.peer} answered the hello with {answer.WhichOneof('kind')}")
        welcome: pb.Welcome = answer.welcome
        return welcome

    async def _refusal(self) -> TransportError:
        code, details = await self._call.code(), await self._call.details()
        if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT):
            return ProtocolError(f"{self.peer} refused the exchange: {details}")
        return PeerLostError(f"{self.peer} ended the handshake ({code.name}: {details})")

    def start(
        self, on_message: Callable[[pb.ExchangeResponse], None], on_end: Callable[[str], None]
    ) -> None:
        """Read and write from now on. `on_end` is called once, with the reason."""
        self._tasks = [
            asyncio.create_task(self._read(on_message, on_end)),
            asyncio.create_task(self.writer.run()),
        ]

    async def _read(
        self, on_message: Callable[[pb.ExchangeResponse], None], on_end: Callable[[str], None]
    ) -> None:
        reason = "the stream's reader stopped"
        try:
            while isinstance(message := await self._call.read(), pb.ExchangeResponse):
                on_message(message)
            code, details = await self._call.code(), await self._call.details()
            self.ended_in_order = code is grpc.StatusCode.OK
            reason = f"the stream ended, {code.name}: {details or 'in order'}"
        except STREAM_FAILURES as error:
            reason = f"the stream failed, {_reason(error)}"
        except ProtocolError as error:
            reason = str(error)
        finally:
            on_end(reason)

    async def phase_of(self, slot: int, sequence: int) -> str:
        """Of an exchange that was not answered in time, as the peer sees it."""
        request = pb.LocateRequest(
            attn_rank=self._hello.attn_rank,
            instance_epoch=self._hello.instance_epoch,
            tag=pb.Tag(slot=slot, sequence=sequence),
        )
        return await phase_told(self._stub.Locate(request, timeout=ASK_S))

    async def close(self, *, in_order: bool = True) -> None:
        """End the stream. With `in_order`, both halves: see the proto for what that promises."""
        if self._tasks and in_order and not self._call.done():
            with contextlib.suppress(*STREAM_FAILURES, TimeoutError):
                async with asyncio.timeout(FAREWELL_TIMEOUT_S):
                    await self.writer.sent()
                    await self._call.done_writing()
                    await asyncio.wait([self._tasks[0]])
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close(None)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
