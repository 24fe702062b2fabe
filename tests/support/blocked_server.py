"""A gRPC server in a process of its own whose event loop is held up in a chosen way.

`python -m support.blocked_server` prints its port and serves `/blocked/Stream` until its stdin
ends: the request names the way and its answer is "begun", then, after the block, "done".
`BlockedServer` runs one.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import torch

from moe_core.service.grpc_channel import KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS
from moe_core.service.grpc_host import SERVER_OPTIONS

ROOT = Path(__file__).resolve().parent.parent.parent
PATH = "/blocked/Stream"
# Whoever took a busy process for a frozen one would have given it up by then.
BLOCK_S = (KEEPALIVE_TIME_MS + KEEPALIVE_TIMEOUT_MS) / 1000 + 0.7


class BlockedServer:
    """Use it as a context manager: nothing of it is left afterwards."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.blocked_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT / "tests",
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )
        assert self.process.stdout is not None
        self.address = f"127.0.0.1:{int(self.process.stdout.readline())}"

    def __enter__(self) -> "BlockedServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


def block(way: str) -> None:
    if way == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif way == "holding the GIL":
        ctypes.PyDLL(None).usleep(int(BLOCK_S * 1e6))  # PyDLL keeps the GIL
    elif way == "in torch":
        matrix, begun = torch.ones(1024, 1024), time.monotonic()
        while time.monotonic() - begun < BLOCK_S:
            matrix @ matrix


async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401
    yield b"begun"
    await asyncio.sleep(0.1)  # until it is on its way
    block(request.decode())
    yield b"done"


async def main() -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers = {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("blocked", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
