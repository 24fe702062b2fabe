"""Where a dispatch is that was not answered in time, in the words of its error: network, queue or
compute.

Knows what the expert's end can say of it, and what its silence means. Experts compute on their
event loop, and one run at a time: a process that answers at all is between two runs, so what it has
and has not answered waits for its turn; one that does not answer computes.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

import grpc
import grpc.aio

from moe_core.pb.epserve.v1 import expert_pb2 as pb

ASK_S = 0.3
COMPUTE = f"compute (the peer has not answered a question for {ASK_S:g} s)"
UNKNOWN = "queue or compute at the peer, or the network on the way back"
PHASES = {
    pb.LocateResponse.NOT_ARRIVED: "network (it has not reached the peer)",
    pb.LocateResponse.QUEUED: "queue (it waits for its turn at the peer)",
    pb.LocateResponse.ANSWERED: "network (the peer has answered it)",
}


async def phase_told(answer: Awaitable[Any]) -> str:
    """From the answer to a LocateRequest that was sent with a deadline of ASK_S. A peer of the
    release before does not know the question."""
    try:
        return PHASES.get((await answer).where, UNKNOWN)
    except grpc.aio.AioRpcError as error:
        return COMPUTE if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else UNKNOWN
    except asyncio.CancelledError:
        own = asyncio.current_task()
        if own is not None and own.cancelling():
            raise
        return UNKNOWN  # a channel that is closed cancels its calls
