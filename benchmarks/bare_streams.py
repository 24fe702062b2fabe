"""Servers that do nothing but stream: what grpc.aio and uvicorn cost by themselves.

Run as a process by gateway_overhead.py. Knows the public Generate method, its messages and one SSE
event; every stream gets the same bytes NUM times, one a step.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from gateway.http.host import HttpHost
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from moe_core.pb.epserve.v1 import gateway_pb2_grpc

EVENT = (
    b'data: {"id":"cmpl-00000000000000000000000000000000","object":"text_completion",'
    b'"created":1700000000,"model":"tiny_model","choices":[{"index":0,"text":" token",'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)
HEADERS = [(b"content-type", b"text/event-stream")]


class Pace:
    """One wake-up for all streams, as a step of the engine is."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            done, self._next = self._next, asyncio.get_running_loop().create_future()
            done.set_result(None)

    async def step(self) -> None:
        await asyncio.shield(self._next)


class BareGateway(gateway_pb2_grpc.GatewayServicer):
    def __init__(self, pace: Pace, num: int) -> None:
        self._pace = pace
        self._num = num

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ANN401
        message = pb.GenerateResponse(request_id="r", token_ids=[7], text=" token")
        for _ in range(self._num):
            yield message
            await self._pace.step()


def bare_http(pace: Pace, num: int) -> Any:  # noqa: ANN401
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        for _ in range(num):
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
            await pace.step()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return app


async def serve(step_s: float, num: int) -> None:
    pace = Pace(step_s)
    pacing = asyncio.create_task(pace.run())
    server = grpc.aio.server()
    gateway_pb2_grpc.add_GatewayServicer_to_server(BareGateway(pace, num), server)
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    http_port = await HttpHost().start(bare_http(pace, num), "127.0.0.1", 0)
    print(json.dumps({"grpc": grpc_port, "http": http_port, "uvicorn": uvicorn.__version__}))
    sys.stdout.flush()
    await pacing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=float, required=True, help="seconds")
    parser.add_argument("--num", type=int, required=True, help="messages of a stream")
    options = parser.parse_args()
    uvloop.run(serve(options.step, options.num))


if __name__ == "__main__":
    main()
