"""The gateway's end of AttentionService.Serve: one stream per DP group, shared by its requests.

Knows streams, and which answer belongs to which request. Knows no text, no client, and not why
a group was chosen. When a stream ends, every request on it fails with UnavailableError naming
the group and the cause; a request that its owner lets go of early is aborted on the engine.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc.aio
import structlog

from gateway.balancer import Group
from gateway.requests import Sequence
from moe_core.cluster import ClusterState, Role
from moe_core.errors import EpserveError, UnavailableError
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1.attention_pb2_grpc import AttentionServiceStub
from moe_core.service.grpc_channel import error_from_status, open_channel

log = structlog.get_logger(__name__)

ABORTED = "abort"


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one sequence; finish_reason is empty while it runs."""

    token_ids: tuple[int, ...]
    finish_reason: str = ""


class SequenceStream:
    """One sequence on an engine, from its submission until it has finished or is closed."""

    def __init__(self, link: "_GroupLink", sequence_id: str) -> None:
        self._link = link
        self._sequence_id = sequence_id
        self._deltas: asyncio.Queue[Delta | EpserveError] = asyncio.Queue()

    async def next(self) -> Delta:
        """The next tokens. Raises UnavailableError when the group is lost, or the error with
        which the engine ended the sequence. How long to wait is the client's deadline: a lost
        group always ends the wait."""
        item = await self._deltas.get()
        if isinstance(item, EpserveError):
            raise item
        return item

    def put(self, item: Delta | EpserveError) -> None:
        self._deltas.put_nowait(item)

    def abort(self) -> None:
        """End the sequence now: the engine drops it, and `next` gives a last, aborted delta."""
        self.close()
        self.put(Delta((), ABORTED))

    def close(self) -> None:
        """Let go of the sequence; the engine is told unless it has finished it itself."""
        self._link.forget(self._sequence_id)


class AttentionPool:
    """The streams to all DP groups in use; opened by the first request that needs them."""

    def __init__(self) -> None:
        self._links: dict[int, _GroupLink] = {}
        self._serial = itertools.count()
        self._closing: set[asyncio.Task[None]] = set()

    def submit(self, group: Group, sequence: Sequence) -> SequenceStream:
        """Start `sequence` on `group`; a failure surfaces in the stream's `next`."""
        link = self._links.get(group.dp_rank)
        if link is None or not link.serves(group):
            self._drop(group.dp_rank, "another process has taken its place")
            link = self._links[group.dp_rank] = _GroupLink(group)
        return link.submit(f"{sequence.request_id}/{next(self._serial)}", sequence)

    def reconcile(self, state: ClusterState) -> None:
        """Close the streams to processes that are no longer members."""
        epochs = {member.instance_epoch for member in state.tier(Role.ATTN)}
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
    def __init__(self, group: Group) -> None:
        self.instance_epoch = group.leader.instance_epoch
        self._name = f"attention group dp_rank={group.dp_rank} at {group.leader.address}"
        self._streams: dict[str, SequenceStream] = {}
        self._outgoing: asyncio.Queue[pb.EngineRequest] = asyncio.Queue()
        self._lost: UnavailableError | None = None
        self._channel = open_channel(group.leader.address)
        stub: Any = AttentionServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._call = stub.Serve(self._requests())
        self._reading = asyncio.create_task(self._read(), name=self._name)

    def serves(self, group: Group) -> bool:
        return self._lost is None and self.instance_epoch == group.leader.instance_epoch

    def submit(self, sequence_id: str, sequence: Sequence) -> SequenceStream:
        stream = self._streams[sequence_id] = SequenceStream(self, sequence_id)
        self._outgoing.put_nowait(pb.EngineRequest(add=_add(sequence_id, sequence)))
        return stream

    def forget(self, sequence_id: str) -> None:
        if self._streams.pop(sequence_id, None) is not None and self._lost is None:
            abort = pb.AbortSequence(sequence_id=sequence_id)
            self._outgoing.put_nowait(pb.EngineRequest(abort=abort))

    async def close(self, reason: str) -> None:
        self._fail_all(reason)
        self._reading.cancel()
        await asyncio.wait({self._reading})
        await self._channel.close(None)

    async def _requests(self) -> AsyncIterator[pb.EngineRequest]:
        while True:
            yield await self._outgoing.get()

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
        stream = take(output.sequence_id, None)
        if stream is None:
            return
        if output.finish_reason == "error":
            stream.put(error_from_status(output.error_code or "INTERNAL", output.error))
        else:
            stream.put(Delta(tuple(output.token_ids), output.finish_reason))

    def _fail_all(self, reason: str) -> None:
        """The first reason counts: what follows a loss only says that it was lost."""
        if self._lost is not None:
            return
        self._lost = UnavailableError(f"{self._name} was lost: {reason}")
        log.info("a group's stream ended", group=self._name, reason=reason)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put(self._lost)


def _add(sequence_id: str, sequence: Sequence) -> pb.AddSequence:
    return pb.AddSequence(
        sequence_id=sequence_id,
        prompt_ids=sequence.prompt_ids,
        priority=sequence.priority,
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
        ),
    )
