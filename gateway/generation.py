"""A request's life in the gateway: let in, admitted, run by a group, turned into text, finished.

Knows the order of these steps, and which requests are under way. Knows no wire: servicers turn
what clients send into a GenerationRequest, and Chunks into what clients are sent.
"""

import os
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as Many
from contextlib import aclosing, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from gateway.admission import QUICK_PROMPT_IDS, ServedModel, admit
from gateway.attention_pool import AttentionPool
from gateway.callers import Caller
from gateway.cluster import Registry
from gateway.entrance import QueueLimits
from gateway.fair_slots import FairSlots
from gateway.groups import leaving_groups
from gateway.observers import NoObserver, RequestObserver, RequestWatch
from gateway.place import Place
from gateway.request_stream import ABORTED, Delta
from gateway.requests import Chunk, GenerationRequest, Sequence
from gateway.resume import Found, check_resumption, find
from gateway.running import RunningRequest, Shaped
from gateway.sequence_output import SequenceOutput
from gateway.waiting_room import DEFAULT_ATTN_WAIT_S, WaitingRoom
from moe_core.errors import RequestError, UnavailableError

SHUTTING_DOWN = "this gateway is shutting down and takes no new requests"


class Generator:
    """Serves requests until `drain`. attn_wait_s: see WaitingRoom."""

    def __init__(
        self,
        model: ServedModel,
        registry: Registry,
        pool: AttentionPool,
        limits: QueueLimits | None = None,
        observer: RequestObserver | None = None,
        *,
        attn_wait_s: float = DEFAULT_ATTN_WAIT_S,
    ) -> None:
        self.model = model
        self._limits = limits or QueueLimits()
        self._observer = observer or NoObserver()
        self._pool = pool
        self._registry = registry
        self._room = WaitingRoom(registry, self._limits, attn_wait_s=attn_wait_s)
        self._admitting = FairSlots(max(1, (os.cpu_count() or 1) // 2))
        # By caller and request_id.
        self._live: dict[tuple[str, str], Place | RunningRequest[Any]] = {}

    @property
    def under_way(self) -> Collection[str]:
        """The ids of all requests that wait or run."""
        return [request_id for _, request_id in self._live]

    def require_room(self, caller: Caller) -> None:
        """Before a request is read; see WaitingRoom."""
        self._room.require_room(caller)

    def at_once(self, caller: Caller) -> int:
        """So many of a caller's requests fit side by side where nothing else is under way, and
        leave others most of the queue: more that belong together would refuse each other."""
        share = max(1, self._limits.max_requests // 4)
        return min(share, caller.max_concurrent_requests or share)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """As generate_batches, chunk by chunk."""
        async with aclosing(self.generate_batches(request, _unchanged)) as batches:
            async for batch in batches:
                for chunk in batch:
                    yield chunk

    async def generate_batches(
        self, request: GenerationRequest, shape: Callable[[Chunk], Shaped | None]
    ) -> AsyncGenerator[list[Shaped], None]:
        """The request's output as it comes, choices interleaved, all that is there at once, each
        chunk as `shape` makes it when it comes, but for what it makes None of: that it has dealt
        with itself. The last chunk of each choice has a finish_reason, and after all of them this
        ends. A caller that stops early (cancelled, or past its deadline) closes this, and the
        engine is told. What fails one choice, fails the request."""
        with self._watched(request) as watch:
            request = _named(request)
            with self._room.enter(request) as place, self._under_way(request, place):
                outputs, running = await self._start(request, shape, place, watch)
                if running is None:
                    shaped = map(shape, _aborted(outputs, watch))
                    yield [each for each in shaped if each is not None]
                    return
                with closing(running):
                    while not running.ended:
                        yield await running.next()

    async def _start(
        self,
        request: GenerationRequest,
        shape: Callable[[Chunk], Shaped | None],
        place: Place,
        watch: RequestWatch,
    ) -> tuple[list[SequenceOutput], RunningRequest[Shaped] | None]:
        """The request's choices, once a group runs them; none does where it was aborted before."""
        choices = _all_choices(request, await self._admit(request), watch.traceparent)
        outputs = self._outputs(request, choices)
        found = await self._find(request, choices)
        if found is not None:
            choices = [replace(choice, seed=found.seed) for choice in choices]
        group = await place.turn(choices, None if found is None else found.group)
        if group is None:
            return outputs, None
        take_over = found is not None
        running = RunningRequest(
            self._pool, place, choices, outputs, shape, group, watch, take_over=take_over
        )
        self._live[_key(request)] = running
        watch.admitted(choices, group.dp_rank)
        return outputs, running

    def _outputs(self, request: GenerationRequest, choices: Many[Sequence]) -> list[SequenceOutput]:
        skips = [*(request.resume_from or ()), *(0 for _ in choices)]
        tokenizer = self.model.tokenizer
        return [
            SequenceOutput(choice, tokenizer, skip=skip)
            for choice, skip in zip(choices, skips, strict=False)
        ]

    async def _find(self, request: GenerationRequest, choices: Many[Sequence]) -> Found | None:
        """Where a request that is resumed runs already."""
        if request.resume_from is None:
            return None
        check_resumption(request, choices)
        return await find(self._pool, self._registry.state, request, choices)

    async def check(self, requests: Iterable[GenerationRequest]) -> list[GenerationRequest]:
        """The same requests of one caller, each named and admitted. Raises what `generate` would
        refuse any or all of them with, before one of them costs anything."""
        named = map(_named, requests)
        admitted = [replace(request, admitted=await self._admit(request)) for request in named]
        self._room.require_tokens(admitted)
        return admitted

    def abort(self, caller: Caller, request_id: str) -> bool:
        """End a request of `caller` early; its client gets finish_reason "abort". False if `caller`
        has none of that id here."""
        found = self._live.get((caller.name, request_id))
        if found is None:
            return False
        found.abort()
        return True

    def reconcile(self) -> None:
        """The cluster has changed: there may be room, nobody left to wait for, or a group that
        leaves and whose requests another can take."""
        self._room.pump()
        leaving = leaving_groups(self._registry.state)
        for request in self._live.values():
            if leaving and isinstance(request, RunningRequest):
                request.leave(leaving)

    async def drain(self) -> None:
        """Refuse new requests and wait for those under way, the waiting ones among them; the
        caller sets the deadline."""
        self._room.close(UnavailableError(SHUTTING_DOWN))
        await self._room.until_empty()

    def close(self) -> None:
        """Refuse the requests that still wait."""
        self._room.refuse_waiting(UnavailableError(SHUTTING_DOWN))

    @contextmanager
    def _watched(self, request: GenerationRequest) -> Iterator[RequestWatch]:
        """Whoever watches is told how the request ended."""
        watch = self._observer.watch(request)
        error: BaseException | None = None
        try:
            yield watch
        except BaseException as caught:
            error = caught
            raise
        finally:
            watch.ended(error)

    @contextmanager
    def _under_way(self, request: GenerationRequest, place: Place) -> Iterator[None]:
        key = _key(request)
        if key in self._live:
            raise RequestError(f"request_id={request.request_id!r}: such a request is under way")
        self._live[key] = place
        try:
            yield
        finally:
            del self._live[key]

    async def _admit(self, request: GenerationRequest) -> Sequence:
        """The request's first choice. Cutting text into tokens takes a second for every million
        characters, and so runs beside the loop."""
        if request.admitted is not None:
            return request.admitted
        kv_tokens = max(group.kv_tokens for group in self._room.usable_groups())
        work = partial(admit, request, self.model, kv_tokens)
        prompt = request.prompt or ()
        if isinstance(prompt, str) or len(prompt) > QUICK_PROMPT_IDS:
            return await self._admitting.run(request.caller, len(prompt), work)
        return work()


def _all_choices(request: GenerationRequest, first: Sequence, traceparent: str) -> list[Sequence]:
    if traceparent:
        first = replace(first, traceparent=traceparent)
    return [first, *(replace(first, index=index) for index in range(1, request.sampling.n or 1))]


def _unchanged(chunk: Chunk) -> Chunk:
    return chunk


def _named(request: GenerationRequest) -> GenerationRequest:
    if request.resume_from is not None and not request.request_id:
        raise RequestError("resume_from: needs the request_id of the request to resume")
    return request if request.request_id else replace(request, request_id=uuid.uuid4().hex)


def _key(request: GenerationRequest) -> tuple[str, str]:
    """A request_id is its caller's own: nobody else's stands in its way."""
    return request.caller.name, request.request_id


def _aborted(outputs: Many[SequenceOutput], watch: RequestWatch) -> list[Chunk]:
    chunks = [output.push(Delta((), ABORTED)) for output in outputs]
    for chunk in chunks:
        watch.put_out(chunk)
    return chunks
