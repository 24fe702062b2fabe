"""A stream's events on their way to its client.

Knows ASGI's `send`, a way past it for a client that keeps up, and which events of one stream are
not written yet. Knows no event's contents and no connection.

Events are written by the step that brought them, all streams' one after the other once its tokens
have been worked through: waking a task for each stream costs more than the write. Where a client
does not keep up, `send` waits for it in a task of its own, and until that has ended the events are
the stream's task's to write. So whoever reads slowly holds up nobody else.
"""

import asyncio
from collections.abc import Callable

from starlette.types import Send

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
WriteNow = Callable[[bytes], bool]
"""Write a part of a body that has begun. False where the client would have to be waited for or is
gone: nothing was written then."""


class StepWrites:
    """The writers that have something to write once what brought it has been worked through."""

    def __init__(self) -> None:
        self._writers: list[EventWriter] = []

    def add(self, writer: "EventWriter") -> None:
        """`writer.write_now()` is called soon."""
        if not self._writers:
            asyncio.get_running_loop().call_soon(self._write)
        self._writers.append(writer)

    def _write(self) -> None:
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.write_now()


class EventWriter:
    """One stream's. `put` takes events from anywhere in the loop; all else is its task's.

    Invariant: all events of `put` but those in `_events` have been written in their order, or are
    in the one call of `send` that is under way, the task's or `_rest`; there is none unless
    `_held`.
    """

    def __init__(self, send: Send, write_now: WriteNow, writes: StepWrites) -> None:
        self.begun = False
        self._send = send
        self._write_now = write_now
        self._writes = writes
        self._events: list[bytes] = []
        self._held = True  # until the response has begun
        self._rest: asyncio.Task[None] | None = None
        self._failure: Exception | None = None

    def put(self, event: bytes) -> bool:
        """Whether `write` has to be called for it."""
        if not event:
            return self._held
        self._events.append(event)
        if not self._held and len(self._events) == 1:
            self._writes.add(self)
        return self._held

    def write_now(self) -> None:
        """Write what there is, unless the task does. What fails here, fails the task's next
        write."""
        if self._held or not self._events:
            return
        part = b"".join(self._events)
        try:
            if self._write_now(part):
                self._events.clear()
                return
        except Exception as error:
            self._failure = error
        else:
            self._rest = asyncio.create_task(self._send_events(), name="slow client")
        self._held = True

    async def write(self) -> None:
        """Begin the response where it has not, and write what there is and what comes meanwhile."""
        await self._take_over()
        if not self.begun:
            self.begun = True
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS}
            )
        while self._events:
            await self._send_events()
        self._held = False

    async def end(self, last: bytes) -> None:
        """Write `last` after all that was put, and nothing after it."""
        await self._take_over()
        self._events.append(last)
        await self._send_events(more=False)

    async def aclose(self) -> None:
        """Let go of what is not written."""
        self._held = True
        self._events.clear()
        if self._rest is not None:
            self._rest.cancel()
            await asyncio.gather(self._rest, return_exceptions=True)

    async def _take_over(self) -> None:
        self._held = True
        if self._failure is not None:
            raise self._failure
        if self._rest is not None:
            rest, self._rest = self._rest, None
            await rest

    async def _send_events(self, *, more: bool = True) -> None:
        part = b"".join(self._events)
        self._events.clear()
        await self._send({"type": "http.response.body", "body": part, "more_body": more})
