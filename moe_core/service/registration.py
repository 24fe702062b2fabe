"""One registration stream of a worker, from its Join to its end.

Knows ClusterService.Register, its messages and the lease that goes with it. Knows nothing of what
comes before or after: that a worker registers again is membership.py's business.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from moe_core.cluster import ClusterState, ExpertLoad, Join, StatusReport
from moe_core.errors import ProtocolError, UnavailableError
from moe_core.pb.epserve.v1 import cluster_pb2 as pb
from moe_core.pb.epserve.v1.cluster_pb2_grpc import ClusterServiceStub
from moe_core.protocol import PROTOCOL_VERSIONS, UNSAID
from moe_core.service.certificates import ServerCheck
from moe_core.service.cluster_codec import (
    cluster_from_pb,
    expert_load_to_pb,
    join_to_pb,
    report_to_pb,
)
from moe_core.service.grpc_channel import error_from_rpc, open_channel
from moe_core.service.layout_codec import parallel_from_pb
from moe_core.service.lease import Lease


class Outbox:
    """What is yet to be told on one stream: of each kind of report only the newest."""

    def __init__(self, status: StatusReport | None, load: ExpertLoad | None) -> None:
        self._status = status
        self._load = load
        self._closed = False
        self._filled = asyncio.Event()
        self._filled.set()

    def close(self) -> None:
        """The requests end. gRPC waits for the next one for ever, also of a stream that is over."""
        self._closed = True
        self._filled.set()

    def put(self, report: StatusReport | ExpertLoad) -> None:
        if isinstance(report, StatusReport):
            self._status = report
        else:
            self._load = report
        self._filled.set()

    async def requests(self, join: Join) -> AsyncIterator[pb.RegisterRequest]:
        """The stream's requests, until `close`."""
        yield pb.RegisterRequest(join=_join_message(join))
        while True:
            await self._filled.wait()
            if self._closed:
                return
            self._filled.clear()
            status, self._status = self._status, None
            if status is not None:
                yield pb.RegisterRequest(status=report_to_pb(status))
            load, self._load = self._load, None
            if load is not None:
                yield pb.RegisterRequest(expert_load=expert_load_to_pb(load))


class Registration:
    """`rank` and `parallel` are what the gateway has assigned."""

    def __init__(
        self, gateway: str, security: ServerCheck | None, join: Join, outbox: Outbox
    ) -> None:
        """Opens a channel of its own: it shows the certificate that is there now."""
        self._gateway = gateway
        self._security = security
        self._join = join
        self._channel = open_channel(gateway, security)
        self._outbox = outbox
        stub: Any = ClusterServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._call = stub.Register(outbox.requests(join))
        self._answers = aiter(self._call)
        self._lease: Lease | None = None

    async def open(self) -> None:
        """Until the gateway has assigned a rank; from then on leases are sent. Raises
        UnavailableError when there is no gateway, or the gateway's own refusal."""
        answer = await self._next()
        if answer.WhichOneof("kind") != "assigned":
            raise ProtocolError(f"gateway {self._gateway}: the first answer is no Assigned")
        self._check_version(answer.assigned.protocol_version)
        self.rank = answer.assigned.rank
        if self._join.rank not in (None, self.rank):
            raise ProtocolError(
                f"gateway {self._gateway}: asked for rank {self._join.rank}, got {self.rank}"
            )
        self.parallel = parallel_from_pb(answer.assigned.parallel)
        join = self._join
        self._lease = Lease(
            self._gateway, self._security, join.role, self.rank, join.instance_epoch
        )

    def _check_version(self, chosen: int) -> None:
        if (chosen or max(UNSAID)) not in PROTOCOL_VERSIONS:
            raise ProtocolError(
                f"gateway {self._gateway} chose protocol version {chosen} out of "
                f"{list(PROTOCOL_VERSIONS)}"
            )

    async def next_state(self) -> ClusterState:
        """The next that the gateway sends. Raises the error with which it has ended the stream."""
        answer = await self._next()
        if answer.WhichOneof("kind") != "state":
            raise ProtocolError(f"gateway {self._gateway}: a later answer is no ClusterState")
        return cluster_from_pb(answer.state)

    async def close(self) -> None:
        """End the stream; the gateway removes this member at once. Safe to call twice."""
        if self._lease is not None:
            self._lease.stop()
        self._outbox.close()
        self._call.cancel()
        await self._channel.close(None)

    async def _next(self) -> pb.RegisterResponse:
        try:
            answer: pb.RegisterResponse = await anext(self._answers)
        except StopAsyncIteration:
            raise UnavailableError(f"gateway {self._gateway} ended the registration") from None
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, f"gateway {self._gateway}") from None
        return answer


def _join_message(join: Join) -> pb.Join:
    message = join_to_pb(join)
    message.protocol_versions[:] = PROTOCOL_VERSIONS
    return message
