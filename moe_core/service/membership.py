"""A worker's end of ClusterService.Register: join, report, and know who else is there.

Knows the registration stream and its deadlines. Knows nothing of what the worker does; whether
the cluster is as the worker needs it is a predicate of the caller's.

The stream is also the heartbeat: when it ends, the worker is out of the cluster and `lost` says
why. This membership does not rejoin; a process that lost it ends.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import structlog

from moe_core.cluster import (
    AttentionLoad,
    ClusterState,
    EngineMetrics,
    ExpertLoad,
    Join,
    LinkStats,
    MemberState,
    Role,
    StatusReport,
)
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import EpserveError, ProtocolError, UnavailableError
from moe_core.pb.epserve.v1 import cluster_pb2 as pb
from moe_core.pb.epserve.v1.cluster_pb2_grpc import ClusterServiceStub
from moe_core.service.certificates import Certificates, ServerCheck, expecting
from moe_core.service.cluster_codec import (
    cluster_from_pb,
    expert_load_to_pb,
    join_to_pb,
    report_to_pb,
)
from moe_core.service.grpc_channel import error_from_rpc, open_channel
from moe_core.service.layout_codec import parallel_from_pb
from moe_core.service.lease import Lease
from moe_core.service.peer_roles import PeerRole

log = structlog.get_logger(__name__)

__all__ = ["Join", "Membership"]

RETRY_S = 0.5


class Membership:
    """A place in the cluster, from `join` until `close` or until `lost` raises."""

    def __init__(self, gateway_address: str, security: ServerCheck | None) -> None:
        self._channel = open_channel(gateway_address, security)
        self._gateway = gateway_address
        self._security = security
        self._changed = asyncio.Condition()
        self._reported = asyncio.Event()
        self._unsent: StatusReport | None = None
        self._unsent_load: ExpertLoad | None = None
        self._error: EpserveError | None = None
        self._state: ClusterState | None = None
        self._lease: Lease | None = None
        self._reading: asyncio.Task[None] | None = None
        self.rank = -1
        self.parallel = ParallelConfig()

    @classmethod
    async def join(
        cls,
        gateway_address: str,
        join: Join,
        *,
        timeout_s: float,
        tls: Certificates | None = None,
    ) -> "Membership":
        """Join the cluster of the gateway at `gateway_address` (host:port), waiting up to
        `timeout_s` for a gateway that is not there yet. When this returns, `rank`, `parallel`
        and `state` are known. Raises UnavailableError when no gateway came in time, and at once
        the gateway's own refusal (of a rank, a fingerprint, a dtype)."""
        membership = cls(gateway_address, expecting(tls, PeerRole.GATEWAY))
        try:
            await membership._join_until(join, time.monotonic() + timeout_s, timeout_s)
        except BaseException:
            await membership.close()
            raise
        return membership

    @property
    def state(self) -> ClusterState:
        """The latest that the gateway has sent."""
        assert self._state is not None, "join has not returned yet"
        return self._state

    def report(
        self,
        state: MemberState,
        *,
        detail: str = "",
        store_address: str = "",
        attention_load: AttentionLoad | None = None,
        links: Sequence[LinkStats] = (),
        engine_metrics: EngineMetrics | None = None,
        prepared_epoch: int | None = None,
        used_epoch: int | None = None,
    ) -> None:
        """Tell the gateway, and so everybody, how this worker is. Replaces the last report; of
        several that wait to be sent only the newest is."""
        self._unsent = StatusReport(
            state,
            detail,
            store_address,
            attention_load,
            tuple(links),
            engine_metrics,
            prepared_epoch,
            used_epoch,
        )
        self._reported.set()

    def report_expert_load(self, load: ExpertLoad) -> None:
        """Tell the gateway, and nobody else, which experts this worker's tokens went to."""
        self._unsent_load = load
        self._reported.set()

    async def wait_until(
        self, predicate: Callable[[ClusterState], bool], timeout_s: float, what: str
    ) -> ClusterState:
        """The first state that satisfies `predicate`. Raises UnavailableError after `timeout_s`,
        naming `what` was awaited and the ranks that are not ready, or when the stream ends."""

        def settled() -> bool:
            return self._error is not None or predicate(self.state)

        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(settled)
        except TimeoutError:
            missing = [phrase for role in Role for phrase in self.state.missing(role)]
            raise UnavailableError(
                f"waited {timeout_s:g} s for {what}; not ready: {'; '.join(missing) or 'nobody'}"
            ) from None
        if self._error is not None:
            raise self._error
        return self.state

    async def next_state(self, seen: ClusterState) -> ClusterState:
        """The first that is another one than `seen`, however long that takes; ends as `lost`."""

        def settled() -> bool:
            return self._error is not None or self._state is not seen

        async with self._changed:
            await self._changed.wait_for(settled)
        if self._error is not None:
            raise self._error
        return self.state

    async def lost(self) -> None:
        """Waits for the end of the registration, and raises why it ended."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._error is not None)
        assert self._error is not None
        raise self._error

    async def close(self) -> None:
        """Leave the cluster. The gateway removes this member at once."""
        if self._lease is not None:
            self._lease.stop()
        if self._reading is not None:
            self._reading.cancel()
            with suppress(asyncio.CancelledError):
                await self._reading
        await self._channel.close(None)

    async def _join_until(self, join: Join, deadline: float, timeout_s: float) -> None:
        noted = False
        while True:
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self._join_once(join)
                return
            except UnavailableError as error:
                reason = str(error)
                if deadline - time.monotonic() < RETRY_S:
                    raise
            except TimeoutError:
                raise UnavailableError(
                    f"no gateway answered at {self._gateway} within {timeout_s:g} s"
                ) from None
            if not noted:
                log.info("waiting for the gateway", address=self._gateway, reason=reason)
                noted = True
            await asyncio.sleep(RETRY_S)

    async def _join_once(self, join: Join) -> None:
        stub: Any = ClusterServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        call = stub.Register(self._requests(pb.RegisterRequest(join=join_to_pb(join))))
        answers = aiter(call)
        try:
            assigned = await self._next(answers)
            if assigned.WhichOneof("kind") != "assigned":
                raise ProtocolError(f"gateway {self._gateway}: the first answer is no Assigned")
            self.rank = assigned.assigned.rank
            self.parallel = parallel_from_pb(assigned.assigned.parallel)
            await self._take_state(await self._next(answers))
        except BaseException:
            call.cancel()
            raise
        self._lease = Lease(
            self._gateway, self._security, join.role, self.rank, join.instance_epoch
        )
        self._reading = asyncio.create_task(self._read(call, answers), name="membership")

    async def _requests(self, join: pb.RegisterRequest) -> AsyncIterator[pb.RegisterRequest]:
        yield join
        while True:
            await self._reported.wait()
            self._reported.clear()
            report, self._unsent = self._unsent, None
            if report is not None:
                yield pb.RegisterRequest(status=report_to_pb(report))
            load, self._unsent_load = self._unsent_load, None
            if load is not None:
                yield pb.RegisterRequest(expert_load=expert_load_to_pb(load))

    async def _next(self, answers: AsyncIterator[pb.RegisterResponse]) -> pb.RegisterResponse:
        try:
            return await anext(answers)
        except StopAsyncIteration:
            raise UnavailableError(f"gateway {self._gateway} ended the registration") from None
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, f"gateway {self._gateway}") from None

    async def _take_state(self, answer: pb.RegisterResponse) -> None:
        if answer.WhichOneof("kind") != "state":
            raise ProtocolError(f"gateway {self._gateway}: a later answer is no ClusterState")
        async with self._changed:
            self._state = cluster_from_pb(answer.state)
            self._changed.notify_all()

    async def _read(
        self,
        call: grpc.aio.StreamStreamCall[Any, Any],
        answers: AsyncIterator[pb.RegisterResponse],
    ) -> None:
        try:
            while True:
                await self._take_state(await self._next(answers))
        except EpserveError as error:
            async with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            call.cancel()
