"""A request's life in the gateway: admitted, sent to a group, turned into text, finished.

Knows the order of these steps, and which requests are under way. Knows no wire: servicers turn
what clients send into a GenerationRequest, and Chunks into what clients are sent.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import replace

from gateway.admission import ServedModel, admit
from gateway.attention_pool import AttentionPool, Delta, RequestStream
from gateway.balancer import Balancer, Group, require_groups
from gateway.cluster import Registry
from gateway.observers import NoObserver, RequestObserver, RequestWatch
from gateway.requests import Chunk, GenerationRequest, Sequence, Usage
from gateway.stop_strings import StopStrings
from gateway.tokenizer import Detokenizer, TextTokenizer
from moe_core.errors import RequestError, UnavailableError

STOP = "stop"


class Generator:
    """Serves requests until `drain`."""

    def __init__(
        self,
        model: ServedModel,
        registry: Registry,
        pool: AttentionPool,
        observer: RequestObserver | None = None,
    ) -> None:
        self.model = model
        self._observer = observer or NoObserver()
        self._registry = registry
        self._pool = pool
        self._balancer = Balancer()
        self._live: dict[str, RequestStream] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

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
            async with aclosing(self._generate_batches(request, watch)) as batches:
                async for batch in batches:
                    for chunk in batch:
                        watch.put_out(chunk)
                    yield batch
        except BaseException as caught:
            error = caught
            raise
        finally:
            watch.ended(error)

    async def _generate_batches(
        self, request: GenerationRequest, watch: RequestWatch
    ) -> AsyncGenerator[list[Chunk], None]:
        choices, stream = await self._start(request, watch)
        request_id = choices[0].request_id
        outputs = [SequenceOutput(choice, self.model.tokenizer) for choice in choices]
        try:
            while not all(output.finished for output in outputs):
                batch = []
                for index, delta in await stream.next():
                    if delta.queued_s is not None:
                        watch.queued(delta.queued_s)
                    if outputs[index].finished:
                        continue  # a stop string was found in a delta before this one
                    chunk = outputs[index].push(delta)
                    if chunk.finish_reason:
                        stream.drop(index)
                    if chunk.token_ids or chunk.text or chunk.finish_reason:
                        batch.append(chunk)
                if batch:
                    yield batch
        finally:
            stream.close()
            del self._live[request_id]
            if not self._live:
                self._idle.set()

    async def check(self, requests: Iterable[GenerationRequest]) -> None:
        """Raises what `generate` would refuse any of them with, before one of them costs
        anything."""
        kv_tokens = max(group.kv_tokens for group in self._usable_groups())
        for request in requests:
            await asyncio.to_thread(admit, request, self.model, kv_tokens)

    def abort(self, request_id: str) -> bool:
        """End a request early; its client gets finish_reason "abort". False if it is not here."""
        stream = self._live.get(request_id)
        if stream is None:
            return False
        stream.abort()
        return True

    async def drain(self) -> None:
        """Refuse new requests and wait for those under way; the caller sets the deadline."""
        self._draining = True
        await self._idle.wait()

    async def _start(
        self, request: GenerationRequest, watch: RequestWatch
    ) -> tuple[list[Sequence], RequestStream]:
        """All choices go to one group, where they can share the prompt's blocks. Admission cuts
        text into tokens, a second for every million characters, and so runs beside the loop."""
        kv_tokens = max(group.kv_tokens for group in self._usable_groups())
        first = await asyncio.to_thread(admit, request, self.model, kv_tokens)
        groups = self._usable_groups()
        if first.request_id in self._live:
            raise RequestError(f"request_id={first.request_id!r}: such a request is under way")
        choices = [
            replace(first, index=index, traceparent=watch.traceparent)
            for index in range(request.sampling.n or 1)
        ]
        group = self._balancer.choose(groups, first.num_tokens, len(choices))
        stream = self._live[first.request_id] = self._pool.submit(group, choices)
        self._idle.clear()
        watch.admitted(choices, group.dp_rank)
        return choices, stream

    def _usable_groups(self) -> tuple[Group, ...]:
        if self._draining:
            raise UnavailableError("this gateway is shutting down and takes no new requests")
        return require_groups(self._registry.state)


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
        )
