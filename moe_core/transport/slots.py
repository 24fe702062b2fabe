"""Which slots of a link are free, and who waits for one.

Knows numbers only: neither memory nor what a slot is used for.
"""

import asyncio
from collections import deque

from moe_core.errors import TransportError


class SlotPool:
    """Free slots, handed out in the order in which they were asked for; the slot that was free
    last goes first, since its memory is still in the caches."""

    def __init__(self, slot_count: int) -> None:
        self._free = list(range(slot_count))
        self._waiters: deque[asyncio.Future[int]] = deque()

    def take(self) -> int | None:
        """A free slot at once, unless there is none or others wait for one."""
        return self._free.pop() if self._free and not self._waiters else None

    async def wait(self, timeout_s: float) -> int:
        """The next free slot. Raises TimeoutError, or what `fail` was given."""
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.give(waiter.result())
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def give(self, slot: int) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(slot)
                return
        self._free.append(slot)

    def fail(self, error: TransportError) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(error)
        self._waiters.clear()
