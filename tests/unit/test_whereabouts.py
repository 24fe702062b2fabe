"""Where an unanswered dispatch is, in the words of its error."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import grpc
import grpc.aio
import pytest

from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.transport.base import Dispatch, Reply
from moe_core.transport.local import LocalLink
from moe_core.transport.whereabouts import UNKNOWN, phase_told
from support.exchange_ends import SPEC, answer_to, make_dispatch

Where = pb.LocateResponse


async def answered(where: Any) -> pb.LocateResponse:  # noqa: ANN401
    return pb.LocateResponse(where=where)


async def refused(code: grpc.StatusCode) -> pb.LocateResponse:
    none = grpc.aio.Metadata()
    raise grpc.aio.AioRpcError(code, none, none, "")


@pytest.mark.parametrize(
    ("answer", "phase"),
    [
        (lambda: answered(Where.QUEUED), "queue "),
        (lambda: answered(Where.NOT_ARRIVED), "network (it has not reached"),
        (lambda: answered(Where.ANSWERED), "network (the peer has answered"),
        (lambda: refused(grpc.StatusCode.DEADLINE_EXCEEDED), "compute "),
        (lambda: answered(Where.UNKNOWN), UNKNOWN),
        (lambda: refused(grpc.StatusCode.UNIMPLEMENTED), UNKNOWN),  # by the release before
        (lambda: refused(grpc.StatusCode.UNAVAILABLE), UNKNOWN),
    ],
)
async def test_each_answer_has_its_phase(answer: Any, phase: str) -> None:  # noqa: ANN401
    assert (await phase_told(answer())).startswith(phase)


async def test_a_channel_that_is_closed_meanwhile_ends_nothing_but_the_question() -> None:
    call: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    call.cancel()
    assert await phase_told(call) == UNKNOWN


async def test_whoever_asks_can_be_cancelled() -> None:
    never: Awaitable[Any] = asyncio.get_running_loop().create_future()
    asking = asyncio.create_task(phase_told(never))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_the_expert_side_knows_what_it_has_and_what_it_has_answered() -> None:
    waiting: list[tuple[Dispatch, Reply]] = []
    link = LocalLink(lambda dispatch, reply: waiting.append((dispatch, reply)), SPEC)
    pending = await link.dispatch(make_dispatch(2, SPEC), 5.0)
    ((slot, found),) = link._in_flight.items()
    where = link._session.where
    assert where(slot, found.sequence) == Where.NOT_ARRIVED
    await asyncio.sleep(0)
    assert where(slot, found.sequence) == Where.QUEUED
    dispatch, reply = waiting[0]
    reply.complete(answer_to(dispatch), 1, 2)
    assert where(slot, found.sequence) == Where.ANSWERED
    assert where(slot, found.sequence + 1) == Where.NOT_ARRIVED
    assert where(SPEC.slot_count, 1) == Where.NOT_ARRIVED
    pending.release()
    await link.close()
