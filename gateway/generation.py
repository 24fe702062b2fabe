"""A request's life in the gateway: let in, admitted, run by a group, turned into text, finished.

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
from gateway.running import RunningRequest
from gateway.sequence_output import SequenceOutput
from gateway.waiting_room import DEFAULT_ATTN_WAIT_S, WaitingRoom
from moe_core.errors import RequestError, UnavailableError

SHUTTING_DOWN = "this gateway is shutting down and takes no new requests"
QUICK_PROMPT_IDS = 8_192  # so many are checked within a millisecond


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
        self._observer = observer or NoObserver()
        self._pool = pool
        self._registry = registry
        self._room = WaitingRoom(registry, limits, attn_wait_s=attn_wait_s)
        self._admitting = FairSlots(max(1, (os.cpu_count() or 1) // 2))
        self._live: dict[tuple[str, str], Place | RunningRequest] = {}  # by caller and request_id

    @property
    def under_way(self) -> Collection[str]:
        """The ids of all requests that wait or run."""
        return [request_id for _, request_id in self._live]

    def require_room(self, caller: Caller) -> None:
        """Before a request is read; see WaitingRoom."""
        self._room.require_room(caller)

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
        if request.resume_from is not None and not request.request_id:
            raise RequestError("resume_from: needs the request_id of the request to resume")
        request = replace(request, request_id=request.request_id or uuid.uuid4().hex)
        key = _key(request.caller, request.request_id)
        with self._room.enter(request) as place, self._under_way(key, place):
            choices = await self._admit(request)
            outputs = self._outputs(request, choices)
            found = await self._find(request, choices)
            if found is not None:
                choices = [replace(choice, seed=found.seed) for choice in choices]
            group = await place.turn(choices, None if found is None else found.group)
            if group is None:
                yield [output.push(Delta((), ABORTED)) for output in outputs]
                return
            choices = [replace(choice, traceparent=watch.traceparent) for choice in choices]
            running = self._live[key] = RunningRequest(
                self._pool, place, choices, group, watch, take_over=found is not None
            )
            watch.admitted(choices, group.dp_rank)
            with closing(running):
                while not all(output.finished for output in outputs):
                    batch = await _next_chunks(running, outputs, watch)
                    if batch:
                        yield batch

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
        """The same requests, each admitted. Raises what `generate` would refuse any of them with,
        before one of them costs anything."""
        return [replace(request, admitted=(await self._admit(request))[0]) for request in requests]

    def abort(self, caller: Caller, request_id: str) -> bool:
        """End a request of `caller` early; its client gets finish_reason "abort". False if `caller`
        has none of that id here."""
        found = self._live.get(_key(caller, request_id))
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
    def _under_way(self, key: tuple[str, str], place: Place) -> Iterator[None]:
        if key in self._live:
            raise RequestError(f"request_id={key[1]!r}: such a request is under way")
        self._live[key] = place
        try:
            yield
        finally:
            del self._live[key]

    async def _admit(self, request: GenerationRequest) -> list[Sequence]:
        """The request's choices. Cutting text into tokens takes a second for every million
        characters, and so runs beside the loop."""
        if request.admitted is not None:
            return _all_choices(request, request.admitted)
        kv_tokens = max(group.kv_tokens for group in self._room.usable_groups())
        work = partial(admit, request, self.model, kv_tokens)
        prompt = request.prompt or ()
        if isinstance(prompt, str) or len(prompt) > QUICK_PROMPT_IDS:
            first = await self._admitting.run(request.caller, len(prompt), work)
        else:
            first = work()
        return _all_choices(request, first)


def _all_choices(request: GenerationRequest, first: Sequence) -> list[Sequence]:
    request_id, owner = request.request_id, request.caller.tag
    return [
        replace(first, request_id=request_id, index=index, owner=owner)
        for index in range(request.sampling.n or 1)
    ]


def _key(caller: Caller, request_id: str) -> tuple[str, str]:
    """A request_id is its caller's own: nobody else's stands in its way."""
    return caller.name, request_id


async def _next_chunks(
    running: RunningRequest, outputs: Many[SequenceOutput], watch: RequestWatch
) -> list[Chunk]:
    """What has come, without chunks that say nothing."""
    chunks = []
    for index, came in await running.next():
        if outputs[index].finished:
            continue  # a stop string was found in a delta before this one
        delta = running.took(index, came)
        if delta.queued_s is not None:
            watch.queued(delta.queued_s)
        chunk = outputs[index].push(delta)
        if chunk.finish_reason:
            running.drop(index)
        if chunk.token_ids or chunk.text or chunk.finish_reason:
            chunks.append(chunk)
    return chunks
