"""The gateway's end of AttentionService.Serve: one stream per DP group, shared by its requests.

Knows streams, and which answer belongs to which request. Knows no text, no client, and not why
a group was chosen. When a stream ends, every request on it fails with UnavailableError naming
the group and the cause; a request that its owner lets go of early is aborted on the engine.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import grpc.aio
import structlog

from gateway.balancer import Group
from gateway.requests import Sequence, TokenLogprobs
from moe_core.cluster import ClusterState, MemberState, Role
from moe_core.errors import EpserveError, UnavailableError
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1.attention_pb2_grpc import AttentionServiceStub
from moe_core.service.certificates import Certificates, ServerCheck, expecting
from moe_core.service.grpc_channel import error_from_status, open_channel
from moe_core.service.peer_roles import PeerRole

log = structlog.get_logger(__name__)

ABORTED = "abort"


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice; finish_reason is empty while it runs. logprobs has one entry per
    token, or none. With the first token come cached_tokens, those of the prompt that were found in
    the KV cache, and queued_s, the seconds until its first step."""

    token_ids: tuple[int, ...]
    finish_reason: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0
    queued_s: float | None = None


class RequestStream:
    """The choices of one request on an engine, from their submission until each has finished or
    is let go of."""

    def __init__(self, link: "_GroupLink", sequence_ids: Iterable[str]) -> None:
        self._link = link
        self._sequence_ids = tuple(sequence_ids)
        self._dropped: set[int] = set()
        self._items: asyncio.Queue[tuple[int, Delta | EpserveError]] = asyncio.Queue()
        self._held: tuple[int, EpserveError] | None = None  # what follows a batch

    async def next(self) -> list[tuple[int, Delta]]:
        """All that has come of choices that were not dropped, in order, with their indices; waits
        until there is something. Raises UnavailableError when the group is lost, or the error
        with which the engine ended such a choice, once what came before it was given out. How
        long to wait is the client's deadline: a lost group always ends the wait."""
        found = [await self._next_one()]
        while self._held is None and not self._items.empty():
            index, item = self._items.get_nowait()
            if isinstance(item, EpserveError):
                self._held = index, item
            elif index not in self._dropped:
                found.append((index, item))
        return found

    async def _next_one(self) -> tuple[int, Delta]:
        while True:
            held, self._held = self._held, None
            index, item = held or await self._items.get()
            if index in self._dropped:
                continue  # it was on its way
            if isinstance(item, EpserveError):
                raise item
            return index, item

    def put(self, index: int, item: Delta | EpserveError) -> None:
        """What the engine has to say of one choice."""
        self._items.put_nowait((index, item))

    def abort(self) -> None:
        """End the request now: the engine drops the choices that are still running, and `next`
        gives each of them a last, aborted delta."""
        for index, sequence_id in enumerate(self._sequence_ids):
            if self._link.forget(sequence_id):
                self.put(index, Delta((), ABORTED))

    def drop(self, index: int) -> None:
        """Let go of one choice; the engine is told unless it has finished it itself."""
        self._dropped.add(index)
        self._link.forget(self._sequence_ids[index])

    def close(self) -> None:
        """Let go of all choices."""
        for sequence_id in self._sequence_ids:
            self._link.forget(sequence_id)


class AttentionPool:
    """The streams to all DP groups in use; opened by the first request that needs them."""

    def __init__(self, tls: Certificates | None = None) -> None:
        self._security = expecting(tls, PeerRole.ATTN)
        self._links: dict[int, _GroupLink] = {}
        self._serial = itertools.count()
        self._closing: set[asyncio.Task[None]] = set()

    def submit(self, group: Group, choices: Many[Sequence]) -> RequestStream:
        """Start a request's choices, in the order of their indices, on `group`; a failure
        surfaces in the stream's `next`."""
        link = self._links.get(group.dp_rank)
        if link is None or not link.serves(group):
            self._drop(group.dp_rank, "another process has taken its place")
            link = self._links[group.dp_rank] = _GroupLink(group, self._security)
        serial = next(self._serial)
        ids = [f"{each.request_id}/{serial}/{each.index}" for each in choices]
        return link.submit(dict(zip(ids, choices, strict=True)))

    def reconcile(self, state: ClusterState) -> None:
        """Close the streams to processes that are no longer members, or have failed."""
        members = state.tier(Role.ATTN)
        epochs = {m.instance_epoch for m in members if m.state is not MemberState.FAILED}
        gone = [rank for rank, link in self._links.items() if link.instance_epoch not in epochs]
        for dp_rank in gone:
            self._drop(dp_rank, "the process has left the cluster")

    async def close(self) -> None:
        for dp_rank in list(self._links):
            self._drop(dp_rank, "this gateway is shutting down")
        await asyncio.gather(*self._closing)

    def _drop(self, dp_rank: int, reason: str) -> None:
        link = self._links.pop(dp_rank, None)
        if link is not None:
            closing = asyncio.create_task(link.close(reason), name="close group link")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)


class _GroupLink:
    def __init__(self, group: Group, security: ServerCheck | None) -> None:
        self.instance_epoch = group.leader.instance_epoch
        self._name = f"attention group dp_rank={group.dp_rank} at {group.leader.address}"
        self._streams: dict[str, tuple[RequestStream, int]] = {}
        self._outgoing: asyncio.Queue[pb.EngineRequest | None] = asyncio.Queue()
        self._lost: UnavailableError | None = None
        self._channel = open_channel(group.leader.address, security)
        stub: Any = AttentionServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._call = stub.Serve(self._requests())
        self._reading = asyncio.create_task(self._read(), name=self._name)

    def serves(self, group: Group) -> bool:
        return self._lost is None and self.instance_epoch == group.leader.instance_epoch

    def submit(self, choices: Mapping[str, Sequence]) -> RequestStream:
        stream = RequestStream(self, choices)
        for sequence_id, sequence in choices.items():
            self._streams[sequence_id] = stream, sequence.index
            self._outgoing.put_nowait(pb.EngineRequest(add=_add(sequence_id, sequence)))
        return stream

    def forget(self, sequence_id: str) -> bool:
        """Whether the sequence was still running."""
        if self._streams.pop(sequence_id, None) is None:
            return False
        abort = pb.AbortSequence(sequence_id=sequence_id)
        self._outgoing.put_nowait(pb.EngineRequest(abort=abort))
        return True

    async def close(self, reason: str) -> None:
        self._fail_all(reason)
        self._outgoing.put_nowait(None)
        self._reading.cancel()
        await asyncio.wait({self._reading})
        await self._channel.close(None)

    async def _requests(self) -> AsyncIterator[pb.EngineRequest]:
        """Until `close`: gRPC waits for the next one for ever, also of a stream that is over."""
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def _read(self) -> None:
        try:
            async for step in self._call:
                for output in step.outputs:
                    self._deliver(output)
            self._fail_all("the process ended the stream")
        except grpc.aio.AioRpcError as error:
            self._fail_all(f"{error.code().name}: {error.details()}")
        finally:
            self._fail_all("this gateway stopped reading")

    def _deliver(self, output: pb.SequenceOutput) -> None:
        """Outputs of sequences that nobody waits for any more are late, and dropped."""
        finished = bool(output.finish_reason)
        take = self._streams.pop if finished else self._streams.get
        stream, index = take(output.sequence_id, (None, 0))
        if stream is None:
            return
        if output.finish_reason == "error":
            stream.put(index, error_from_status(output.error_code or "INTERNAL", output.error))
        else:
            stream.put(index, _delta(output))

    def _fail_all(self, reason: str) -> None:
        """The first reason counts: what follows a loss only says that it was lost."""
        if self._lost is not None:
            return
        self._lost = UnavailableError(f"{self._name} was lost: {reason}")
        log.info("a group's stream ended", group=self._name, reason=reason)
        streams, self._streams = self._streams, {}
        for stream, index in streams.values():
            stream.put(index, self._lost)


def _add(sequence_id: str, sequence: Sequence) -> pb.AddSequence:
    return pb.AddSequence(
        sequence_id=sequence_id,
        prompt_ids=sequence.prompt_ids,
        priority=sequence.priority,
        traceparent=sequence.traceparent,
        sampling=pb.EngineSampling(
            max_tokens=sequence.max_tokens,
            temperature=sequence.temperature,
            top_p=sequence.top_p,
            top_k=sequence.top_k,
            min_p=sequence.min_p,
            seed=sequence.seed,
            index=sequence.index,
            stop_token_ids=sequence.stop_token_ids,
            min_tokens=sequence.min_tokens,
            repetition_penalty=sequence.repetition_penalty,
            presence_penalty=sequence.presence_penalty,
            frequency_penalty=sequence.frequency_penalty,
            logit_bias=sequence.logit_bias,
            logprobs=sequence.logprobs,
        ),
    )


def _delta(output: pb.SequenceOutput) -> Delta:
    logprobs = (
        TokenLogprobs(
            each.token_id,
            each.logprob,
            each.rank,
            tuple(each.top_token_ids),
            tuple(each.top_logprobs),
        )
        for each in output.logprobs
    )
    return Delta(
        tuple(output.token_ids),
        output.finish_reason,
        tuple(logprobs),
        output.num_cached_tokens,
        output.queued_us * 1e-6 if output.HasField("queued_us") else None,
    )
