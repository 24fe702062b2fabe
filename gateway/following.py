"""What the leading gateway knows, as another gateway is told it.

Knows ClusterService.FollowLeader and one leader. Knows nothing of how a gateway comes to lead.

A leader that can be heard leads, whatever the registry says of it for a while: so who follows one
does not stand against it.
"""

import asyncio
from typing import Any

import grpc.aio
import structlog

from gateway.cluster import Registry
from moe_core.errors import RequestError
from moe_core.pb.epserve.v1 import cluster_pb2 as pb
from moe_core.pb.epserve.v1.cluster_pb2_grpc import ClusterServiceStub
from moe_core.service.certificates import ServerCheck
from moe_core.service.cluster_codec import cluster_from_pb
from moe_core.service.grpc_channel import error_from_rpc, open_channel
from moe_core.service.shared_records import GatewayRecord

log = structlog.get_logger(__name__)

SILENT_S = 4.0  # the leader says something every second
RETRY_S = 0.25


class Following:
    """Fills the registry with what `leader` says, from its making until `close`."""

    def __init__(
        self,
        leader: GatewayRecord,
        own_address: str,
        registry: Registry,
        security: ServerCheck | None,
    ) -> None:
        self.leader = leader
        self.is_heard = True  # until it could not be
        self._own_address = own_address
        self._registry = registry
        self._security = security
        self._running = asyncio.create_task(self._run(), name="follow the leader")

    async def close(self) -> None:
        self._running.cancel()
        await asyncio.wait({self._running})

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
                reason = "it has ended the stream"
            except TimeoutError:
                reason = f"it has said nothing for {SILENT_S:g} s"
            except grpc.aio.AioRpcError as error:
                reason = str(error_from_rpc(error, self.leader.name))
            except RequestError as error:
                reason = f"it has said what cannot be: {error}"
            if self.is_heard:
                log.warning("the leader is not heard", leader=self.leader.name, reason=reason)
            self.is_heard = False
            await asyncio.sleep(RETRY_S)

    async def _follow(self) -> None:
        version = 0
        async with open_channel(self.leader.cluster_address, self._security) as channel:
            stub: Any = ClusterServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
            answers = aiter(stub.FollowLeader(pb.FollowLeaderRequest(address=self._own_address)))
            while True:
                async with asyncio.timeout(SILENT_S):
                    answer = await anext(answers, None)
                if answer is None:
                    return
                state = cluster_from_pb(answer)
                self._registry.follow(state, news=state.version != version)
                version, self.is_heard = state.version, True
