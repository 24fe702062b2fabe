"""Servers that do nothing but pass tokens on: what grpc.aio and uvicorn cost by themselves.

Run as a process by gateway_overhead.py. Knows AttentionService, the public Generate method, their
messages and one SSE event. Each token of the engine makes its stream write the same bytes: the
least that a gateway on these libraries can do.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import grpc.aio
import uvloop
from starlette.types import Receive, Scope, Send

from child import say, until_closed
from gateway.http.host import HttpHost
from moe_core.pb.epserve.v1 import attention_pb2, gateway_pb2_grpc
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from moe_core.pb.epserve.v1.attention_pb2_grpc import AttentionServiceStub
from moe_core.service.grpc_host import SERVER_OPTIONS

EVENT = (
    b'data: {"id":"cmpl-00000000000000000000000000000000","object":"text_completion",'
    b'"created":1700000000,"model":"tiny_model","choices":[{"index":0,"text":" token",'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)
HEADERS = [(b"content-type", b"text/event-stream")]


class Engine:
    """The engine's one stream of steps, and whose tokens have come."""

    def __init__(self, address: str, num: int) -> None:
        self._num = num
        self._numbers = count()
        self._outgoing: asyncio.Queue[Any] = asyncio.Queue()
        self._come: dict[str, asyncio.Semaphore] = {}
        self._channel = grpc.aio.insecure_channel(address)

    async def run(self) -> None:
        async for step in AttentionServiceStub(self._channel).Serve(self._requests()):
            for output in step.outputs:
                self._come[output.sequence_id].release()

    async def _requests(self) -> AsyncIterator[Any]:
        while True:
            yield await self._outgoing.get()

    async def tokens(self) -> AsyncIterator[None]:
        """Of a new sequence, as they come."""
        sequence_id = f"bare {next(self._numbers)}"
        add = attention_pb2.AddSequence(sequence_id=sequence_id)
        add.sampling.max_tokens = self._num
        self._outgoing.put_nowait(attention_pb2.EngineRequest(add=add))
        come = self._come[sequence_id] = asyncio.Semaphore(0)
        for _ in range(self._num):
            await come.acquire()
            yield
        del self._come[sequence_id]


class BareGateway(gateway_pb2_grpc.GatewayServicer):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ANN401
        message = pb.GenerateResponse(request_id="r", token_ids=[7], text=" token")
        async for _ in self._engine.tokens():
            yield message


def bare_http(engine: Engine) -> Any:  # noqa: ANN401
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        async for _ in engine.tokens():
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return app


async def serve(address: str, num: int) -> None:
    engine = Engine(address, num)
    reading = asyncio.create_task(engine.run())
    server = grpc.aio.server(options=SERVER_OPTIONS)
    gateway_pb2_grpc.add_GatewayServicer_to_server(BareGateway(engine), server)
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    http_port = await HttpHost().start(bare_http(engine), "127.0.0.1", 0)
    say(grpc=grpc_port, http=http_port)
    await until_closed()
    reading.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", required=True, help="address of an AttentionService")
    parser.add_argument("--num", type=int, required=True, help="tokens of a stream")
    options = parser.parse_args()
    uvloop.run(serve(options.engine, options.num))


if __name__ == "__main__":
    main()
