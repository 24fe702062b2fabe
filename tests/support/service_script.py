"""Run as a process: a service whose behaviour its arguments name, for the lifecycle's tests."""

import asyncio
import sys
import time

from moe_core.errors import ConfigError, UnavailableError
from moe_core.service import lifecycle
from moe_core.service.logs import configure_logging


class Scripted:
    name = "scripted"

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour

    async def startup(self) -> None:
        if self.behaviour == "cancelled":
            raise asyncio.CancelledError
        if self.behaviour == "refused":
            raise ConfigError("port", 1, "must be\nsomething else", [2])
        if self.behaviour == "loads":
            self._say("loading")
            await asyncio.to_thread(time.sleep, 60)

    async def serve(self) -> None:
        if self.behaviour == "fails":
            raise UnavailableError("the gateway has left")
        if self.behaviour == "cancelled later":
            raise asyncio.CancelledError
        if self.behaviour == "bug":
            raise KeyError("lost")
        if self.behaviour == "returns":
            return
        self._say("serving")
        await asyncio.Event().wait()

    async def drain(self) -> None:
        self._say("draining")
        if self.behaviour == "stuck":
            await asyncio.Event().wait()
        self._say("drained")

    async def asked_to_leave(self) -> None:
        if self.behaviour == "lost while serving":
            raise UnavailableError("lost its place in the cluster")
        if self.behaviour != "asked to leave":
            await asyncio.Event().wait()

    def _say(self, what: str) -> None:
        print(what, flush=True)


if __name__ == "__main__":
    configure_logging(debug="--debug" in sys.argv)
    timeout = 0.3 if "--short" in sys.argv else 30.0
    sys.exit(lifecycle.run(Scripted(sys.argv[1]), drain_timeout_s=timeout))
