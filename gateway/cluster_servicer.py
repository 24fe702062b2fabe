"""ClusterService as workers meet it: one registration stream each, and their leases.

Knows the streams and the messages; who gets which rank, and what the cluster is, is the
registry's business (cluster.py). No member is in the registry for longer than its stream lives, and
a stream whose member is no longer there is ended. Workers register with the gateway that leads; the
other gateways follow it from here.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import grpc.aio
import structlog

from gateway.cluster import Registry
from gateway.leadership import Leadership
from gateway.leases import CHECK_S
from gateway.registrations import MemberKey
from moe_core.cluster import ClusterState, Join, Role
from moe_core.errors import ProtocolError, RequestError, UnavailableError
from moe_core.pb.epserve.v1 import cluster_pb2 as pb
from moe_core.pb.epserve.v1 import cluster_pb2_grpc
from moe_core.protocol import UNSAID, common_version
from moe_core.service.cluster_codec import (
    cluster_to_pb,
    expert_load_from_pb,
    join_from_pb,
    report_from_pb,
    role_from_pb,
)
from moe_core.service.grpc_host import GrpcHost
from moe_core.service.layout_codec import parallel_to_pb
from moe_core.service.peer_roles import PeerRole, require_role

log = structlog.get_logger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

JOIN_TIMEOUT_S = 10.0
FOLLOW_S = 1.0  # as often as workers report their loads


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    """Serves until `close`, which ends all registrations and takes no more."""

    def __init__(self, registry: Registry, leadership: Leadership) -> None:
        self._registry = registry
        self._leadership = leadership
        self._closing = asyncio.Event()
        self._encoded = pb.ClusterState()

    def add_to(self, host: GrpcHost) -> None:
        add = cluster_pb2_grpc.add_ClusterServiceServicer_to_server
        host.add(add, self, "epserve.v1.ClusterService")

    async def Register(
        self, requests: AsyncIterator[pb.RegisterRequest], context: Context
    ) -> AsyncIterator[pb.RegisterResponse]:
        join, version = await _first_join(requests)
        _check_certificate(context, join.role)
        self._leadership.require("registering processes")
        self._require_open()
        key = self._registry.join(join)
        log.info("joined", role=str(key.role), rank=key.rank, peer=context.peer())
        reports = asyncio.create_task(self._take_reports(requests, key), name="reports")
        closing = asyncio.create_task(self._closing.wait(), name="closing")
        leases = asyncio.create_task(self._check_leases(key), name="leases")
        try:
            parallel = parallel_to_pb(self._registry.accepted)
            assigned = pb.Assigned(rank=key.rank, parallel=parallel, protocol_version=version)
            yield pb.RegisterResponse(assigned=assigned)
            seen = 0
            while (state := await self._next_state(seen, reports, closing)) is not None:
                self._registry.require(key)
                seen = state.version
                yield pb.RegisterResponse(state=self._encode(state))
        finally:
            reports.cancel()
            closing.cancel()
            leases.cancel()
            self._registry.leave(key)
            log.info("left", role=str(key.role), rank=key.rank, peer=context.peer())

    async def Lease(self, request: pb.LeaseRequest, context: Context) -> pb.LeaseResponse:
        role = role_from_pb(request.role)
        _check_certificate(context, role)
        key = MemberKey(role, request.rank, request.instance_epoch)
        self._registry.lease(key, request.loop_idle_ms, request.loop_tasks)
        return pb.LeaseResponse()

    async def FollowLeader(
        self, request: pb.FollowLeaderRequest, context: Context
    ) -> AsyncIterator[pb.ClusterState]:
        log.info("followed", by=request.address)
        version, closing = 0, self._closing
        while True:
            self._leadership.require("saying who is in the cluster")
            state = self._registry.state
            version = state.version
            yield cluster_to_pb(state)
            with suppress(TimeoutError):
                async with asyncio.timeout(FOLLOW_S):
                    await self._registry.versions.newer_than(version)
            if closing.is_set():
                return

    def end_registrations(self) -> None:
        """The workers are to register with another gateway."""
        self._closing.set()
        self._closing = asyncio.Event()

    def close(self) -> None:
        """End every registration; the workers learn that this gateway has left."""
        self._closing.set()

    def _require_open(self) -> None:
        """Raises UnavailableError: a worker that came back at once would come back for ever."""
        if self._closing.is_set():
            raise UnavailableError("this gateway is shutting down and registers no processes")

    async def _next_state(
        self, version: int, reports: asyncio.Task[None], closing: asyncio.Task[bool]
    ) -> ClusterState | None:
        """None when the worker has ended its side or the gateway closes; raises what the worker
        has sent wrongly."""
        newer = asyncio.create_task(self._registry.versions.newer_than(version), name="newer state")
        try:
            await asyncio.wait({newer, reports, closing}, return_when=asyncio.FIRST_COMPLETED)
            if reports.done():
                reports.result()
                return None
            return newer.result() if newer.done() else None
        finally:
            newer.cancel()

    async def _check_leases(self, key: MemberKey) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self._registry.check_lease(key)

    async def _take_reports(
        self, requests: AsyncIterator[pb.RegisterRequest], key: MemberKey
    ) -> None:
        async for request in requests:
            match request.WhichOneof("kind"):
                case "status":
                    self._registry.report(key, report_from_pb(request.status))
                case "expert_load":
                    load = expert_load_from_pb(request.expert_load)
                    self._registry.report_expert_load(key, load)
                case _:
                    raise RequestError("kind: after its Join a worker sends only reports")

    def _encode(self, state: ClusterState) -> pb.ClusterState:
        """One encoding per version, since every member is sent the same."""
        if self._encoded.version != state.version:
            self._encoded = cluster_to_pb(state)
        return self._encoded


def _check_certificate(context: Context, role: Role) -> None:
    """Nobody speaks for a tier whose certificate it does not have. Raises AccessError."""
    require_role(context, PeerRole(role.value), f"an {role} process of the cluster")


async def _first_join(requests: AsyncIterator[pb.RegisterRequest]) -> tuple[Join, int]:
    """And the version of the protocol that this registration uses."""
    try:
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            first = await anext(requests, None)
    except TimeoutError:
        raise RequestError(f"join: nothing was sent within {JOIN_TIMEOUT_S:g} s") from None
    if first is None or first.WhichOneof("kind") != "join":
        raise RequestError("join: the first message of a registration must be a Join")
    join = join_from_pb(first.join)
    return join, _common_version(join, first.join.protocol_versions)


def _common_version(join: Join, offered: Sequence[int]) -> int:
    """Raises RequestError, as for all else that keeps a worker out for good."""
    try:
        return common_version(
            f"the {join.role} process at {join.address}", offered or UNSAID, "the gateway"
        )
    except ProtocolError as error:
        raise RequestError(f"protocol_versions={list(offered)}: {error}") from None
