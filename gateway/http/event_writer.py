"""A stream's events on their way to its client.

Knows ASGI's `send`, and which events of one stream it has not had yet. Knows no event's contents.

Events are written by the step that brought them, all streams' one after the other once its tokens
have been worked through: waking a task for each stream costs more than the write. `send` waits only
for a client that does not keep up; what is left of it then is a task of its own, and until that has
ended the events are the stream's task's to write. So whoever reads slowly holds up nobody else.
"""

import asyncio
from collections.abc import Awaitable, Generator
from typing import Any

from starlette.types import Message, Scope, Send

BODY = "http.response.body"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
PLAIN_SEND = "plain_send"


def keep_plain_send(scope: Scope, send: Send) -> None:
    """For `plain_send`, before others wrap it."""
    scope.setdefault("state", {})[PLAIN_SEND] = send


def plain_send(scope: Scope, send: Send) -> Send:
    """What a response that has begun by `send` may go on with. Starlette wraps `send` several
    times, to see responses begin, and each costs every event a coroutine more."""
    plain: Send = scope.get("state", {}).get(PLAIN_SEND, send)
    return plain


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

    Invariant: `send` has had all events of `put` in their order but those in `_events`, and one
    call of it is under way at a time: the task's while `_held`, else only for as long as
    `write_now` runs.
    """

    def __init__(self, begin: Send, send: Send, writes: StepWrites) -> None:
        """`begin` is sent how the response begins, `send` all that follows."""
        self.begun = False
        self._begin = begin
        self._send = send
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
        self._held = True
        try:
            rest = _run_ahead(self._send(self._taken()))
        except Exception as error:
            self._failure = error
            return
        if rest is None:
            self._held = False
        else:
            self._rest = asyncio.create_task(_finish(rest), name="slow client")

    async def write(self) -> None:
        """Begin the response where it has not, and write what there is and what comes meanwhile."""
        await self._take_over()
        if not self.begun:
            self.begun = True
            await self._begin(
                {"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS}
            )
        while self._events:
            await self._send(self._taken())
        self._held = False

    async def end(self, last: bytes) -> None:
        """Write `last` after all that was put, and nothing after it."""
        await self._take_over()
        self._events.append(last)
        await self._send({**self._taken(), "more_body": False})

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

    def _taken(self) -> Message:
        body = b"".join(self._events)
        self._events.clear()
        return {"type": BODY, "body": body, "more_body": True}


class _Rest:
    """What is left of something awaited that was begun by hand."""

    def __init__(self, iterator: Generator[Any, None, None], waits_for: object) -> None:
        self._iterator = iterator
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, None, None]:
        try:
            yield self._waits_for
        except BaseException:
            self._iterator.close()
            raise
        yield from self._iterator


def _run_ahead(awaitable: Awaitable[None]) -> _Rest | None:
    """Run it as far as it goes without waiting, outside of any task, as asyncio's eager tasks
    (Python 3.12) do; None where it went to its end. Raises what it raises."""
    iterator = awaitable.__await__()
    try:
        return _Rest(iterator, next(iterator))
    except StopIteration:
        return None


async def _finish(rest: _Rest) -> None:
    await rest
