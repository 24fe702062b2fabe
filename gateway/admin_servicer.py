"""What an operator asks of the cluster by gRPC: protobuf in, protobuf out, nothing decided here.

Knows admin.proto. Who may ask is the access table's business (moe_core/service/access.py).
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, TypeAlias

import grpc.aio

from gateway.cluster import Registry
from gateway.draining import drain
from gateway.leadership import Leadership
from gateway.rebalancing import Rebalancer
from gateway.scaling import Scaling
from moe_core.pb.epserve.v1 import admin_pb2 as pb
from moe_core.pb.epserve.v1 import admin_pb2_grpc, cluster_pb2
from moe_core.service.cluster_codec import role_from_pb
from moe_core.service.grpc_host import GrpcHost

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class AdminServicer(admin_pb2_grpc.AdminServicer):
    def __init__(
        self,
        registry: Registry,
        scaling: Scaling,
        rebalancer: Rebalancer,
        leadership: Leadership,
    ) -> None:
        self._registry = registry
        self._leadership = leadership
        self._scaling = scaling
        self._rebalancer = rebalancer

    def add_to(self, host: GrpcHost) -> None:
        host.add(admin_pb2_grpc.add_AdminServicer_to_server, self, "epserve.v1.Admin")

    async def Scale(
        self, request: pb.ScaleRequest, context: Context
    ) -> AsyncIterator[pb.ScaleProgress]:
        attn = request.attn_devices if request.HasField("attn_devices") else None
        expert = request.expert_devices if request.HasField("expert_devices") else None
        async with aclosing(self._scaling.scale(attn, expert)) as phases:
            async for phase in phases:
                yield pb.ScaleProgress(phase=phase, sizes=self._sizes())
        yield pb.ScaleProgress(done=True, sizes=self._sizes())

    async def Rebalance(
        self, request: pb.RebalanceRequest, context: Context
    ) -> pb.RebalanceResponse:
        done = await self._rebalancer.rebalance(force=request.force, dry_run=request.dry_run)
        return pb.RebalanceResponse(**asdict(done))

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        self._leadership.require("draining")
        drain(self._registry, role_from_pb(request.role), request.rank)
        return pb.DrainResponse()

    def _sizes(self) -> cluster_pb2.TierSizes:
        parallel = self._registry.parallel
        return cluster_pb2.TierSizes(
            attn_devices=parallel.attn_devices, expert_devices=parallel.expert_devices
        )
