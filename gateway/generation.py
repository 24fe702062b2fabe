"""A request's life in the gateway: admitted, sent to a group, turned into text, finished.

Knows the order of these steps, and which requests are under way. Knows no wire: servicers turn
what clients send into a GenerationRequest, and Chunks into what clients are sent.
"""

import asyncio
from collections.abc import AsyncGenerator

from gateway.admission import ServedModel, admit
from gateway.attention_pool import AttentionPool, Delta, SequenceStream
from gateway.balancer import Balancer, require_groups
from gateway.cluster import Registry
from gateway.requests import Chunk, GenerationRequest, Sequence, Usage
from gateway.stop_strings import StopStrings
from gateway.tokenizer import Detokenizer, TextTokenizer
from moe_core.errors import RequestError, UnavailableError


class Generator:
    """Serves requests until `drain`."""

    def __init__(self, model: ServedModel, registry: Registry, pool: AttentionPool) -> None:
        self.model = model
        self._registry = registry
        self._pool = pool
        self._balancer = Balancer()
        self._live: dict[str, SequenceStream] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """The request's output as it comes; the last chunk has a finish_reason. A caller that
        stops early (cancelled, or past its deadline) closes this, and the engine is told."""
        sequence, stream = self._start(request)
        output = SequenceOutput(sequence, self.model.tokenizer)
        try:
            while not output.finished:
                chunk = output.push(await stream.next())
                if chunk.token_ids or chunk.text or chunk.finish_reason:
                    yield chunk
        finally:
            stream.close()
            del self._live[sequence.request_id]
            if not self._live:
                self._idle.set()

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

    def _start(self, request: GenerationRequest) -> tuple[Sequence, SequenceStream]:
        if self._draining:
            raise UnavailableError("this gateway is shutting down and takes no new requests")
        groups = require_groups(self._registry.state)
        sequence = admit(request, self.model, max(group.kv_tokens for group in groups))
        if sequence.request_id in self._live:
            raise RequestError(f"request_id={sequence.request_id!r}: such a request is under way")
        group = self._balancer.choose(groups, sequence.num_tokens)
        stream = self._live[sequence.request_id] = self._pool.submit(group, sequence)
        self._idle.clear()
        return sequence, stream


class SequenceOutput:
    """Turns one sequence's tokens into chunks: text, stop strings, finish_reason and usage."""

    def __init__(self, sequence: Sequence, tokenizer: TextTokenizer | None) -> None:
        self.finished = False
        self._sequence = sequence
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopStrings(sequence.stop)
        self._num_tokens = 0

    def push(self, delta: Delta) -> Chunk:
        """Tokens after the one that completed a stop string are not part of the output."""
        texts: list[str] = []
        for count, token_id in enumerate(delta.token_ids, 1):
            self._num_tokens += 1
            text = "" if self._detokenizer is None else self._detokenizer.push(token_id)
            if self._take(text, texts):
                return self._chunk(delta.token_ids[:count], texts, "stop")
        if delta.finish_reason:
            return self._last(delta, texts)
        return self._chunk(delta.token_ids, texts, "")

    def _take(self, text: str, texts: list[str]) -> bool:
        """Whether `text` completes a stop string. Before min_tokens there is no stopping."""
        if self._num_tokens < self._sequence.min_tokens:
            texts.append(text)
            return False
        shown, found = self._stop.push(text)
        texts.append(shown)
        return found

    def _last(self, delta: Delta, texts: list[str]) -> Chunk:
        rest = "" if self._detokenizer is None else self._detokenizer.flush()
        if self._take(rest, texts):
            return self._chunk(delta.token_ids, texts, "stop")
        texts.append(self._stop.flush())
        return self._chunk(delta.token_ids, texts, delta.finish_reason)

    def _chunk(self, token_ids: tuple[int, ...], texts: list[str], finish_reason: str) -> Chunk:
        self.finished = bool(finish_reason)
        usage = Usage(len(self._sequence.prompt_ids), self._num_tokens)
        return Chunk(
            request_id=self._sequence.request_id,
            index=self._sequence.index,
            token_ids=token_ids,
            text="".join(texts),
            finish_reason=finish_reason,
            usage=usage if finish_reason else None,
        )
