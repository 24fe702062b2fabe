"""A request's life in the gateway: let in, admitted, sent to a group, turned into text, finished.

Knows the order of these steps, and which requests are under way. Knows no wire: servicers turn
what clients send into a GenerationRequest, and Chunks into what clients are sent.
"""

import os
import uuid
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator
from collections.abc import Sequence as Many
from contextlib import aclosing, closing, contextmanager
from dataclasses import replace
from functools import partial

from gateway.admission import ServedModel, admit
from gateway.attention_pool import ABORTED, AttentionPool, Delta, RequestStream
from gateway.cluster import Registry
from gateway.entrance import QueueLimits
from gateway.fair_slots import FairSlots
from gateway.observers import NoObserver, RequestObserver, RequestWatch
from gateway.requests import Chunk, GenerationRequest, Sequence, Usage
from gateway.stop_strings import StopStrings
from gateway.tokenizer import Detokenizer, TextTokenizer
from gateway.waiting_room import Place, WaitingRoom
from moe_core.errors import RequestError, UnavailableError

STOP = "stop"
SHUTTING_DOWN = "this gateway is shutting down and takes no new requests"
QUICK_PROMPT_IDS = 8_192  # so many are checked within a millisecond


class Generator:
    """Serves requests until `drain`."""

    def __init__(
        self,
        model: ServedModel,
        registry: Registry,
        pool: AttentionPool,
        limits: QueueLimits | None = None,
        observer: RequestObserver | None = None,
    ) -> None:
        self.model = model
        self._observer = observer or NoObserver()
        self._pool = pool
        self._room = WaitingRoom(registry, limits)
        self._admitting = FairSlots(max(1, (os.cpu_count() or 1) // 2))
        self._live: dict[str, Place | RequestStream] = {}

    @property
    def under_way(self) -> Collection[str]:
        """The ids of all requests that wait or run."""
        return self._live.keys()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """As generate_batches, chunk by chunk."""
        async with aclosing(self.generate_batches(request)) as batches:
            async for batch in batches:
                for chunk in batch:
                    yield chunk

    async def generate_batches(
        self, request: GenerationRequest
    ) -> AsyncGenerator[list[Chunk], None]:
        """The request's output as it comes, choices interleaved, all that is there at once; the
        last chunk of each choice has a finish_reason, and after all of them this ends. A caller
        that stops early (cancelled, or past its deadline) closes this, and the engine is told.
        What fails one choice, fails the request."""
        watch = self._observer.watch(request)
        error: BaseException | None = None
        try:
            async with aclosing(self._batches(request, watch)) as batches:
                async for batch in batches:
                    for chunk in batch:
                        watch.put_out(chunk)
                    yield batch
        except BaseException as caught:
            error = caught
            raise
        finally:
            watch.ended(error)

    async def _batches(
        self, request: GenerationRequest, watch: RequestWatch
    ) -> AsyncGenerator[list[Chunk], None]:
        request = replace(request, request_id=request.request_id or uuid.uuid4().hex)
        with self._room.enter(request) as place, self._under_way(request.request_id, place):
            choices = await self._admit(request)
            outputs = [SequenceOutput(choice, self.model.tokenizer) for choice in choices]
            group = await place.turn(choices)
            if group is None:
                yield [output.push(Delta((), ABORTED)) for output in outputs]
                return
            choices = [replace(choice, traceparent=watch.traceparent) for choice in choices]
            stream = self._live[request.request_id] = self._pool.submit(group, choices)
            watch.admitted(choices, group.dp_rank)
            with closing(stream):
                while not all(output.finished for output in outputs):
                    batch = await _next_chunks(stream, outputs, place, watch)
                    if batch:
                        yield batch

    async def check(self, requests: Iterable[GenerationRequest]) -> None:
        """Raises what `generate` would refuse any of them with, before one of them costs
        anything."""
        for request in requests:
            await self._admit(request)

    def abort(self, request_id: str) -> bool:
        """End a request early; its client gets finish_reason "abort". False if it is not here."""
        found = self._live.get(request_id)
        if found is None:
            return False
        found.abort()
        return True

    def reconcile(self) -> None:
        """The cluster has changed: there may be room, or nobody left to wait for."""
        self._room.pump()

    async def drain(self) -> None:
        """Refuse new requests and wait for those under way, the waiting ones among them; the
        caller sets the deadline."""
        self._room.close(UnavailableError(SHUTTING_DOWN))
        await self._room.until_empty()

    def close(self) -> None:
        """Refuse the requests that still wait."""
        self._room.refuse_waiting(UnavailableError(SHUTTING_DOWN))

    @contextmanager
    def _under_way(self, request_id: str, place: Place) -> Iterator[None]:
        if request_id in self._live:
            raise RequestError(f"request_id={request_id!r}: such a request is under way")
        self._live[request_id] = place
        try:
            yield
        finally:
            del self._live[request_id]

    async def _admit(self, request: GenerationRequest) -> list[Sequence]:
        """The request's choices. Cutting text into tokens takes a second for every million
        characters, and so runs beside the loop."""
        kv_tokens = max(group.kv_tokens for group in self._room.usable_groups())
        work = partial(admit, request, self.model, kv_tokens)
        prompt = request.prompt or ()
        if isinstance(prompt, str) or len(prompt) > QUICK_PROMPT_IDS:
            first = await self._admitting.run(request.caller, len(prompt), work)
        else:
            first = work()
        return [replace(first, index=index) for index in range(request.sampling.n or 1)]


async def _next_chunks(
    stream: RequestStream, outputs: Many["SequenceOutput"], place: Place, watch: RequestWatch
) -> list[Chunk]:
    """What has come, without chunks that say nothing."""
    chunks = []
    for index, delta in await stream.next():
        if outputs[index].finished:
            continue  # a stop string was found in a delta before this one
        if delta.queued_s is not None:
            watch.queued(delta.queued_s)
        place.received(len(delta.token_ids), delta.cached_tokens)
        chunk = outputs[index].push(delta)
        if chunk.finish_reason:
            stream.drop(index)
            place.ended()
        if chunk.token_ids or chunk.text or chunk.finish_reason:
            chunks.append(chunk)
    return chunks


class SequenceOutput:
    """Turns one choice's tokens into chunks: text, stop strings, finish_reason and usage."""

    def __init__(self, sequence: Sequence, tokenizer: TextTokenizer | None) -> None:
        self.finished = False
        self._sequence = sequence
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopStrings(sequence.stop)
        self._num_tokens = 0
        self._cached_tokens = 0

    def push(self, delta: Delta) -> Chunk:
        """Tokens after the one that completed a stop string are not part of the output; a stop
        token is, but its text is not."""
        texts: list[str] = []
        self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
        textless = len(delta.token_ids) if delta.finish_reason == STOP else 0
        for count, token_id in enumerate(delta.token_ids, 1):
            self._num_tokens += 1
            if self._take("" if count == textless else self._text(token_id), texts):
                return self._chunk(delta, count, texts, STOP)
        if delta.finish_reason:
            return self._last(delta, texts)
        return self._chunk(delta, len(delta.token_ids), texts, "")

    def _text(self, token_id: int) -> str:
        return "" if self._detokenizer is None else self._detokenizer.push(token_id)

    def _take(self, text: str, texts: list[str]) -> bool:
        """Whether `text` completes a stop string. Before min_tokens there is no stopping."""
        may_stop = self._num_tokens >= self._sequence.min_tokens
        shown, found = self._stop.push(text, may_stop=may_stop)
        texts.append(shown)
        return found

    def _last(self, delta: Delta, texts: list[str]) -> Chunk:
        rest = "" if self._detokenizer is None else self._detokenizer.flush()
        found = self._take(rest, texts)
        texts.append(self._stop.flush())
        reason = STOP if found else delta.finish_reason
        return self._chunk(delta, len(delta.token_ids), texts, reason)

    def _chunk(self, delta: Delta, count: int, texts: list[str], finish_reason: str) -> Chunk:
        """The first `count` tokens of `delta`."""
        self.finished = bool(finish_reason)
        prompt_tokens = len(self._sequence.prompt_ids)
        usage = Usage(prompt_tokens, self._num_tokens, self._cached_tokens)
        return Chunk(
            request_id=self._sequence.request_id,
            index=self._sequence.index,
            token_ids=delta.token_ids[:count],
            text="".join(texts),
            finish_reason=finish_reason,
            usage=usage if finish_reason else None,
            logprobs=delta.logprobs[:count],
            prompt_logprobs=delta.prompt_logprobs,
        )
