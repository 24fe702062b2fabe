"""The gateway's end of AttentionService.Serve: one stream per DP group, shared by its requests.

Knows streams, and which answer belongs to which request. Knows no text, no client, and not why
a group was chosen. When a stream ends, every request on it fails with GroupLostError naming the
group and the cause; a request that its owner lets go of early is aborted on the engine.

A request that leaves a group has its sequences parked there, where the engine does so: all that
was computed comes first.

A gateway that ends says so for each sequence. One that is killed does not, and the engine keeps
its sequences for a while: `find` asks for them, `submit` with `take_over` goes on with them.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from collections.abc import Sequence as Many
from typing import Any

import grpc.aio
import structlog

from gateway.engine_messages import add_to_pb, delta_from_pb, parked_from_pb
from gateway.groups import Group
from gateway.request_stream import GroupLostError, RequestStream, Taker
from gateway.requests import Sequence
from moe_core.cluster import ClusterState, MemberState, Role
from moe_core.errors import UnavailableError
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1.attention_pb2_grpc import AttentionServiceStub
from moe_core.service.certificates import Certificates, ServerCheck, expecting
from moe_core.service.grpc_channel import error_from_rpc, error_from_status, open_channel
from moe_core.service.peer_roles import PeerRole

log = structlog.get_logger(__name__)

PARKED = "parked"
SHUTTING_DOWN = "this gateway is shutting down"
CLOSE_S = 1.0  # for a group to take the last aborts
FIND_TIMEOUT_S = 3.0


class AttentionPool:
    """The streams to all DP groups in use; opened by the first request that needs them."""

    def __init__(self, tls: Certificates | None = None) -> None:
        self._security = expecting(tls, PeerRole.ATTN)
        self._links: dict[int, _GroupLink] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def submit(
        self, group: Group, choices: Many[Sequence], taker: Taker, *, take_over: bool = False
    ) -> RequestStream:
        """Start a request's choices, in the order of their indices, on `group`, each after its
        output_ids; with `take_over` the group may have them already. `taker` has what comes of
        them, failures among it."""
        return self._link_to(group).submit(choices, taker, take_over)

    async def find(self, group: Group, sequence_ids: Many[str]) -> dict[str, int]:
        """Which of these `group` has, and the seed of each. Raises EpserveError where it does not
        say within FIND_TIMEOUT_S."""
        return await self._link_to(group).find(sequence_ids)

    def reconcile(self, state: ClusterState) -> None:
        """Close the streams to processes that are no longer members, or have failed."""
        members = state.tier(Role.ATTN)
        epochs = {m.instance_epoch for m in members if m.state is not MemberState.FAILED}
        gone = [rank for rank, link in self._links.items() if link.instance_epoch not in epochs]
        for dp_rank in gone:
            self._drop(dp_rank, "the process has left the cluster")

    async def close(self) -> None:
        """What still runs ends with UnavailableError, and no other group is asked."""
        for link in self._links.values():
            link.shut_down()
            self._close(link)
        self._links.clear()
        await asyncio.gather(*self._closing)

    def _link_to(self, group: Group) -> "_GroupLink":
        link = self._links.get(group.dp_rank)
        if link is None or not link.serves(group):
            self._drop(group.dp_rank, "another process has taken its place")
            link = self._links[group.dp_rank] = _GroupLink(group, self._security)
        return link

    def _drop(self, dp_rank: int, reason: str) -> None:
        link = self._links.pop(dp_rank, None)
        if link is not None:
            link.lose(reason)
            self._close(link)

    def _close(self, link: "_GroupLink") -> None:
        closing = asyncio.create_task(link.close(), name="close group link")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


class _GroupLink:
    """Invariant: each sequence that was added has one last output still to come for as long as it
    is in `_streams` or counts in `_leaving`. An id may be used again at once, and what comes of it
    until that last output is its predecessor's.
    """

    def __init__(self, group: Group, security: ServerCheck | None) -> None:
        self.instance_epoch = group.leader.instance_epoch
        self._name = group.name
        self.hands_over = group.load.hands_over
        # With the choice's index, and whether logprobs were asked for.
        self._streams: dict[str, tuple[RequestStream, int, bool]] = {}
        self._leaving: Counter[str] = Counter()
        self._outgoing: asyncio.Queue[pb.EngineRequest | None] = asyncio.Queue()
        self._lost: UnavailableError | None = None
        self._channel = open_channel(group.leader.address, security)
        self._stub: Any = AttentionServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._call = self._stub.Serve(self._requests())
        self._reading = asyncio.create_task(self._read(), name=self._name)

    def serves(self, group: Group) -> bool:
        return self._lost is None and self.instance_epoch == group.leader.instance_epoch

    def submit(self, choices: Many[Sequence], taker: Taker, take_over: bool) -> RequestStream:
        stream = RequestStream(self, {each.index: each.sequence_id for each in choices}, taker)
        for each in choices:
            with_logprobs = (each.logprobs, each.prompt_logprobs) != (None, None)
            self._streams[each.sequence_id] = stream, each.index, with_logprobs
            self._outgoing.put_nowait(pb.EngineRequest(add=add_to_pb(each, take_over)))
        return stream

    async def find(self, sequence_ids: Many[str]) -> dict[str, int]:
        request = pb.FindRequest(sequence_ids=sequence_ids)
        try:
            answer = await self._stub.Find(request, timeout=FIND_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, f"find sequences at {self._name}") from error
        except asyncio.CancelledError:
            if self._lost is None:
                raise
            raise self._lost from None  # a channel that is closed cancels its calls
        return {each.sequence_id: each.seed for each in answer.sequences}

    def forget(self, sequence_id: str) -> bool:
        """Whether the sequence was still running."""
        if self._streams.pop(sequence_id, None) is None:
            return False
        self._leaving[sequence_id] += 1
        abort = pb.AbortSequence(sequence_id=sequence_id)
        self._outgoing.put_nowait(pb.EngineRequest(abort=abort))
        return True

    def runs(self, sequence_id: str) -> bool:
        return sequence_id in self._streams

    def park(self, sequence_id: str) -> None:
        if sequence_id in self._streams:
            park = pb.ParkSequence(sequence_id=sequence_id)
            self._outgoing.put_nowait(pb.EngineRequest(park=park))

    def lose(self, reason: str) -> None:
        """Another group can go on with what still runs."""
        self._end(reason, GroupLostError(f"{self._name} was lost: {reason}"))

    def shut_down(self) -> None:
        """Nobody goes on with what still runs."""
        words = f"{SHUTTING_DOWN}, and the request had not ended in time"
        self._end(SHUTTING_DOWN, UnavailableError(words))

    def _end(self, reason: str, error: UnavailableError) -> None:
        """The first error counts: what follows a loss only says that it was lost."""
        if self._lost is not None:
            return
        self._lost = error
        log.info("a group's stream ended", group=self._name, reason=reason)
        for sequence_id, (stream, index, _) in tuple(self._streams.items()):
            self.forget(sequence_id)
            stream.fail(index, error)

    def _one_less(self, sequence_id: str) -> None:
        self._leaving[sequence_id] -= 1
        if not self._leaving[sequence_id]:
            del self._leaving[sequence_id]

    async def close(self) -> None:
        """In order: the engine is told of each sequence that nobody wants any more, and then that
        no request will come. What it does not take within CLOSE_S, it learns from the end of the
        stream."""
        self._outgoing.put_nowait(None)
        await asyncio.wait({self._reading}, timeout=CLOSE_S)
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
            self.lose("the process ended the stream")
        except grpc.aio.AioRpcError as error:
            self.lose(f"{error.code().name}: {error.details()}")
        finally:
            self.lose("this gateway stopped reading")

    def _deliver(self, output: pb.SequenceOutput) -> None:
        """Outputs of sequences that nobody waits for any more are late, and dropped."""
        sequence_id, finished = output.sequence_id, bool(output.finish_reason)
        if sequence_id in self._leaving:
            if finished:
                self._one_less(sequence_id)
            return
        take = self._streams.pop if finished else self._streams.get
        stream, index, with_logprobs = take(sequence_id, (None, 0, False))
        if stream is None:
            return
        if not finished:
            stream.put(index, delta_from_pb(output, with_logprobs))
        elif output.go_elsewhere:
            stream.fail(index, GroupLostError(f"{self._name} has ended it: {output.error}"))
        elif output.finish_reason == PARKED:
            stream.put_parked(index, parked_from_pb(output))
        elif output.finish_reason == "error":
            stream.fail(index, error_from_status(output.error_code or "INTERNAL", output.error))
        else:
            stream.put(index, delta_from_pb(output, with_logprobs))
