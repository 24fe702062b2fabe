"""Threads for work that would hold up the event loop; callers take turns at them.

Knows callers and the size of each piece of work. A few slots, because the loop needs a core too,
and handed out fairly, because whoever floods the gateway with long texts must not hold up another's
short one.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from gateway.callers import Caller
from gateway.fair_queue import FairQueue

Result = TypeVar("Result")


class FairSlots:
    """At most `size` pieces of work at a time, in the loop's default executor."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()

    async def run(self, caller: Caller, cost: int, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises. Cancelled in line it never runs; cancelled later it runs
        to its end for nobody, and keeps its slot until then."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._queue.push(caller, turn)
        self._pump()
        try:
            await turn
        except asyncio.CancelledError:
            self._queue.remove(turn)
            if not turn.cancelled():
                self._release()
            raise
        self._queue.charge(caller, cost)
        running = loop.run_in_executor(None, work)
        running.add_done_callback(self._done)
        return await asyncio.shield(running)

    def _done(self, running: asyncio.Future[Result]) -> None:
        if not running.cancelled():
            running.exception()  # taken here where its owner has left
        self._release()

    def _release(self) -> None:
        self._free += 1
        self._pump()

    def _pump(self) -> None:
        while self._free and (turn := self._queue.peek()) is not None:
            self._queue.remove(turn)
            if not turn.done():
                self._free -= 1
                turn.set_result(None)
