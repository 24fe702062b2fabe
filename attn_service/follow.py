"""How an attention group's tp_rank 0 gives its step plans to the other ranks.

Knows the Follow stream, both ends, and that all ranks execute the same plans in the same
order. Knows neither how a plan is made nor how it is executed.

The plans travel by gRPC and not by a collective, so an idle rank waits on a stream and not
inside a collective, and plans are sent before the leader enters the step's first collective.
The stream is also how the two ends notice each other's death while nothing is computed.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import structlog

from attn_service.sequence import AskedLogprobs, SequenceSlice, StepPlan
from attn_service.tensor_parallel import GroupLostError, GroupRank
from moe_core.errors import EpserveError, ProtocolError
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1 import attention_pb2_grpc as pb_grpc
from moe_core.service.certificates import Certificates, expecting
from moe_core.service.grpc_channel import error_from_rpc, open_channel
from moe_core.service.peer_roles import PeerRole

log = structlog.get_logger(__name__)

HELLO_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class GroupTerms:
    """What all ranks of a group must agree on: which start of tp_rank 0 leads it, and the
    shape of the KV cache that block ids point into."""

    leader_instance_epoch: int
    num_blocks: int
    block_size: int


class Followers:
    """The leader's end: tp_rank 1 … tp_size-1, each with its Follow stream."""

    def __init__(self, group: GroupRank, terms: GroupTerms, timeout_s: float) -> None:
        self._group = group
        self._terms = terms
        self._timeout_s = timeout_s
        self._contexts: dict[int, Any] = {}
        self._changed = asyncio.Condition()
        self._closed = asyncio.Event()
        self._lost: GroupLostError | None = None

    async def serve(self, requests: AsyncIterator[Any], context: Any) -> None:  # noqa: ANN401
        """One Follow call, until `close`. Raises ProtocolError for a rank that does not belong."""
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            hello = await anext(requests, None)
        if hello is None:
            raise ProtocolError(f"{self._group}: the Follow stream ended before its first message")
        self._check(hello)
        async with self._changed:
            self._contexts[hello.tp_rank] = context
            self._changed.notify_all()
        try:
            await self._closed.wait()
        finally:
            if not self._closed.is_set():
                await asyncio.shield(self._lose(hello.tp_rank, "its Follow stream ended"))

    async def all_connected(self, timeout_s: float) -> None:
        """Raises GroupLostError naming the ranks that did not come in time."""
        wanted = range(1, self._group.tp_size)
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(
                    lambda: self._lost is not None or len(self._contexts) == len(wanted)
                )
        except TimeoutError:
            missing = [rank for rank in wanted if rank not in self._contexts]
            raise GroupLostError(
                f"{self._group}: tp_rank {missing} did not follow within {timeout_s:g} s"
            ) from None
        if self._lost is not None:
            raise self._lost

    async def publish(self, plan: StepPlan) -> None:
        """Send `plan` to every follower. Raises GroupLostError."""
        if self._lost is not None:
            raise self._lost
        message = plan_to_pb(plan)
        for tp_rank, context in self._contexts.items():
            try:
                async with asyncio.timeout(self._timeout_s):
                    await context.write(message)
            except (TimeoutError, grpc.aio.BaseError, asyncio.InvalidStateError) as error:
                raise await self._lose(
                    tp_rank, f"step {plan.step} could not be sent to it: {error!r}"
                ) from error

    async def lost(self) -> None:
        """Waits until a follower is gone, and raises."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._lost is not None)
        assert self._lost is not None
        raise self._lost

    def close(self) -> None:
        """No plan will follow; the streams end in order."""
        self._closed.set()

    def _check(self, hello: Any) -> None:  # noqa: ANN401
        theirs = GroupTerms(hello.leader_instance_epoch, hello.num_blocks, hello.block_size)
        if not 0 < hello.tp_rank < self._group.tp_size or hello.tp_rank in self._contexts:
            raise ProtocolError(
                f"{self._group}: tp_rank {hello.tp_rank} wants to follow, but it is outside "
                f"1…{self._group.tp_size - 1} or follows already"
            )
        if theirs != self._terms:
            raise ProtocolError(
                f"{self._group}: tp_rank {hello.tp_rank} follows {theirs}, the leader has "
                f"{self._terms}; start all ranks with the same kv_cache_tokens and block_size"
            )

    async def _lose(self, tp_rank: int, why: str) -> GroupLostError:
        """Note that the group has ended; the first reason is the one that is told."""
        async with self._changed:
            if self._lost is None:
                self._lost = GroupLostError(f"{self._group} lost tp_rank {tp_rank}: {why}")
            self._changed.notify_all()
            return self._lost


async def follow(
    leader: str,
    group: GroupRank,
    terms: GroupTerms,
    execute: Callable[[StepPlan], Awaitable[None]],
    tls: Certificates | None = None,
) -> None:
    """A follower's end: execute every plan of the leader at address `leader` (host:port).

    Returns when the leader ends the stream in order; raises GroupLostError when the stream
    breaks, and whatever `execute` raises.
    """
    channel = open_channel(leader, expecting(tls, PeerRole.ATTN))
    doing = f"{group} follows tp_rank 0 at {leader}"
    hello = pb.FollowRequest(
        tp_rank=group.tp_rank,
        leader_instance_epoch=terms.leader_instance_epoch,
        num_blocks=terms.num_blocks,
        block_size=terms.block_size,
    )
    try:
        stub: Any = pb_grpc.AttentionServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        call = stub.Follow()
        await call.write(hello)
        async for message in call:
            await execute(plan_from_pb(message))
    except grpc.aio.AioRpcError as error:
        raise _lost_leader(error, doing) from error
    finally:
        await channel.close(CLOSE_TIMEOUT_S)


def _lost_leader(error: grpc.aio.AioRpcError, doing: str) -> EpserveError:
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return GroupLostError(f"{doing}: {error.details()}")
    return error_from_rpc(error, doing)


def plan_to_pb(plan: StepPlan) -> Any:  # noqa: ANN401
    return pb.StepPlan(
        step=plan.step,
        placement_epoch=plan.placement_epoch,
        num_microbatches=plan.num_microbatches,
        sequences=[
            pb.SequenceSlice(
                token_ids=each.token_ids,
                num_computed_tokens=each.num_computed_tokens,
                block_table=each.block_table,
                needs_logits=each.needs_logits,
                asked_logprobs=_asked_to_pb(each.asked_logprobs),
            )
            for each in plan.slices
        ],
    )


def plan_from_pb(message: Any) -> StepPlan:  # noqa: ANN401
    return StepPlan(
        step=message.step,
        placement_epoch=message.placement_epoch,
        num_microbatches=message.num_microbatches,
        slices=tuple(
            SequenceSlice(
                token_ids=tuple(each.token_ids),
                num_computed_tokens=each.num_computed_tokens,
                block_table=tuple(each.block_table),
                needs_logits=each.needs_logits,
                asked_logprobs=_asked_from_pb(each),
            )
            for each in message.sequences
        ),
    )


def _asked_to_pb(asked: AskedLogprobs | None) -> Any:  # noqa: ANN401
    if asked is None:
        return None
    return pb.AskedLogprobs(token_ids=asked.token_ids, num_top=asked.num_top)


def _asked_from_pb(message: Any) -> AskedLogprobs | None:  # noqa: ANN401
    if not message.HasField("asked_logprobs"):
        return None
    asked = message.asked_logprobs
    return AskedLogprobs(tuple(asked.token_ids), asked.num_top)
