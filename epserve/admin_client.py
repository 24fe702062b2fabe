"""A small asynchronous client of the Admin service.

Knows admin.proto and turns it into plain values. Knows nothing of what a change takes.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc.aio

from epserve.gateway_connection import GatewayConnection, Target
from moe_core.cluster import LayerLoad, Role, TierSizes
from moe_core.pb.epserve.v1 import admin_pb2 as pb
from moe_core.pb.epserve.v1 import admin_pb2_grpc
from moe_core.service.cluster_codec import role_to_pb

# A tier grows by processes that load large weights from slow disks, a layer of experts does not.
SCALE_TIMEOUT_S = 3600.0
REBALANCE_TIMEOUT_S = 1800.0
DRAIN_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Of a change of sizes: what is waited for, or that it is done, and the sizes in force."""

    phase: str
    done: bool
    sizes: TierSizes


@dataclass(frozen=True, slots=True)
class Rebalanced:
    """load_before, load_after: of the most loaded EP group over the mean, in the mean of all
    layers. `reason` says why nothing was changed, and is empty where something was. `layers` are
    those that change, the one that gains most first."""

    layers_changed: int
    experts_moved: int
    load_before: float
    load_after: float
    placement_epoch: int
    reason: str
    layers: tuple[LayerLoad, ...] = ()


class AdminClient(GatewayConnection):
    """All calls raise EpserveError subclasses, never gRPC's own."""

    def __init__(self, target: str | Target) -> None:
        super().__init__(target)
        self._stub: Any = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    async def scale(
        self, *, attn_devices: int | None = None, expert_devices: int | None = None
    ) -> AsyncIterator[Progress]:
        """Closing the iterator takes the change back, as far as it is not done."""
        request = pb.ScaleRequest(attn_devices=attn_devices, expert_devices=expert_devices)
        call = self._stub.Scale(request, timeout=SCALE_TIMEOUT_S, metadata=self._metadata)
        try:
            async for answer in call:
                sizes = TierSizes(answer.sizes.attn_devices, answer.sizes.expert_devices)
                yield Progress(answer.phase, answer.done, sizes)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, "scale") from error
        finally:
            call.cancel()

    async def rebalance(self, *, force: bool = False, dry_run: bool = False) -> Rebalanced:
        request = pb.RebalanceRequest(force=force, dry_run=dry_run)
        try:
            answer = await self._stub.Rebalance(
                request, timeout=REBALANCE_TIMEOUT_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, "rebalance") from error
        return Rebalanced(
            answer.layers_changed,
            answer.experts_moved,
            answer.load_before,
            answer.load_after,
            answer.placement_epoch,
            answer.reason,
            tuple(
                LayerLoad(each.layer_id, each.experts_moved, each.load_before, each.load_after)
                for each in answer.layers
            ),
        )

    async def drain(self, role: Role, rank: int) -> None:
        request = pb.DrainRequest(role=role_to_pb(role), rank=rank)
        try:
            await self._stub.Drain(request, timeout=DRAIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, "drain") from error
