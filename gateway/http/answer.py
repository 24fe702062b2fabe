"""One generation's way over HTTP: started, sent as it comes or at once, ended with its client.

Knows the generator, ASGI and when which answer is sent. Knows no field of a body: an
AnswerFormat writes them; and not how events reach the client: an EventWriter does.

A client that goes away cancels its generation, streaming or not. The status line is sent with the
first output, so that what fails before it has a status of its own; what fails later is an event.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import structlog
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gateway.generation import Generator
from gateway.http.connection import write_now_of
from gateway.http.errors import UNFORESEEN, error_event, error_response
from gateway.http.event_writer import EventWriter, StepWrites
from gateway.http.usage import UsageCount
from gateway.requests import Chunk, GenerationRequest
from moe_core.errors import EpserveError

log = structlog.get_logger(__name__)

_ENCODER = json.JSONEncoder(separators=(",", ":"))  # json.dumps would make one for each call
DONE = b"data: [DONE]\n\n"
Shaped = TypeVar("Shaped")


class AnswerFormat(Protocol):
    """Choices are numbered over all prompts of a request."""

    def event(self, choice: int, chunk: Chunk, usage: UsageCount | None) -> bytes:
        """The events of one chunk, `usage` (null otherwise) in them; may be none."""

    def usage_event(self, usage: UsageCount) -> bytes:
        """The event that holds only the usage."""

    def whole(self, chunks: Sequence[Sequence[Chunk]], usage: UsageCount) -> dict[str, object]:
        """The body of an answer that is not streamed, from all chunks of each choice."""


@dataclass(frozen=True, slots=True)
class Streaming:
    """usage_at_end: in an event of its own. usage_always: in every event, so far."""

    usage_at_end: bool = False
    usage_always: bool = False


class Answer:
    """An ASGI response to one request, which may have several prompts with `num_choices` each.
    `streaming` None: one JSON body."""

    def __init__(
        self,
        generator: Generator,
        requests: Sequence[GenerationRequest],
        answer_format: AnswerFormat,
        num_choices: int,
        usage: UsageCount,
        streaming: Streaming | None,
        writes: StepWrites,
    ) -> None:
        self._generator = generator
        self._requests = requests
        self._prompts = {each.request_id: number for number, each in enumerate(requests)}
        self._format = answer_format
        self._num_choices = num_choices
        self._usage = usage
        self._streaming = streaming
        self._writes = writes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_when_gone(receive):
            if self._streaming is None:
                await self._send_whole(scope, receive, send)
            else:
                await self._send_stream(scope, receive, send, self._streaming)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._collect()
        except EpserveError as error:
            response = error_response(error)
        await response(scope, receive, send)

    async def _collect(self) -> Response:
        chunks: list[list[Chunk]] = [[] for _ in range(len(self._requests) * self._num_choices)]

        def keep(chunk: Chunk) -> None:
            chunks[self._counted(chunk)].append(chunk)

        batches: AsyncGenerator[list[None], None] = self._batches(keep)
        async with aclosing(batches):
            async for _ in batches:
                pass
        return JSONResponse(self._format.whole(chunks, self._usage))

    async def _send_stream(
        self, scope: Scope, receive: Receive, send: Send, streaming: Streaming
    ) -> None:
        async with aclosing(EventWriter(send, write_now_of(scope), self._writes)) as writer:
            put = partial(self._put_events, writer, streaming)
            try:
                async with aclosing(self._batches(put)) as held:
                    async for _ in held:
                        await writer.write()
            except Exception as error:
                if not isinstance(error, EpserveError):
                    log.exception("a stream failed", path=scope["path"])
                    error = EpserveError(UNFORESEEN)
                if not writer.begun:
                    await error_response(error)(scope, receive, send)
                    return
                last = error_event(error)
            else:
                usage = self._format.usage_event(self._usage) if streaming.usage_at_end else b""
                last = usage + DONE
            await writer.end(last)

    def _put_events(self, writer: EventWriter, streaming: Streaming, chunk: Chunk) -> bool | None:
        """None unless `writer` has to be told to write them."""
        choice = self._counted(chunk)
        shown = self._usage if streaming.usage_always else None
        return writer.put(self._format.event(choice, chunk, shown)) or None

    def _counted(self, chunk: Chunk) -> int:
        """The number of its choice."""
        prompt = self._prompts[chunk.request_id]
        self._usage.add(prompt, chunk)
        return prompt * self._num_choices + chunk.index

    def _batches(
        self, shape: Callable[[Chunk], Shaped | None]
    ) -> AsyncGenerator[list[Shaped], None]:
        if len(self._requests) == 1:
            return self._generator.generate_batches(self._requests[0], shape)
        return _merged(self._generator, self._requests, shape)


async def _merged(
    generator: Generator,
    requests: Sequence[GenerationRequest],
    shape: Callable[[Chunk], Shaped | None],
) -> AsyncGenerator[list[Shaped], None]:
    """All requests of one caller, as many side by side as it may have. The first that fails ends
    the others."""
    turns = asyncio.Semaphore(generator.at_once(requests[0].caller))
    results: asyncio.Queue[list[Shaped] | Exception | None] = asyncio.Queue()

    async def pump(request: GenerationRequest) -> None:
        try:
            async with turns, aclosing(generator.generate_batches(request, shape)) as batches:
                async for batch in batches:
                    results.put_nowait(batch)
        except Exception as error:
            results.put_nowait(error)
        else:
            results.put_nowait(None)

    async with AsyncExitStack() as stack:
        for request in requests:
            stack.push_async_callback(_end, asyncio.create_task(pump(request)))
        running = len(requests)
        while running:
            result = await results.get()
            if isinstance(result, Exception):
                raise result
            if result is None:
                running -= 1
            else:
                yield result


@asynccontextmanager
async def cancelled_when_gone(receive: Receive) -> AsyncIterator[None]:
    """What runs inside is cancelled when the client goes away, and that is its end: as
    asyncio.timeout does, it tells its own cancelling from others' by counting."""
    task = asyncio.current_task()
    assert task is not None
    before, gone = task.cancelling(), False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching = asyncio.create_task(watch(), name="client")
    try:
        yield
    except asyncio.CancelledError:
        if not gone or task.uncancel() > before:
            raise
    finally:
        watching.cancel()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def dumps(value: object) -> bytes:
    return _ENCODER.encode(value).encode()
