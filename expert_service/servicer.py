"""Keeps the door of `ExpertService` while this process has no experts yet.

A process needs an address before it may join, and its rank before it can load. So the server
starts first, and whoever comes too early is told so. Knows nothing of what is exchanged.
"""

from typing import Any

from moe_core.errors import UnavailableError
from moe_core.pb.epserve.v1 import expert_pb2_grpc
from moe_core.service.grpc_host import GrpcHost
from moe_core.transport.handover_servicer import HandoverServicer
from moe_core.transport.servicer import ExchangeServicer

SERVICE_NAME = "epserve.v1.ExpertService"
LOADING = "this expert process is still loading its weights"


class ExchangeGate(expert_pb2_grpc.ExpertServiceServicer):
    """Answers UNAVAILABLE until `open`, then hands every call to the real servicers."""

    def __init__(self) -> None:
        self._exchange: ExchangeServicer | None = None
        self._handover: HandoverServicer | None = None

    def add_to(self, host: GrpcHost) -> None:
        host.add(expert_pb2_grpc.add_ExpertServiceServicer_to_server, self, SERVICE_NAME)

    def open(self, exchange: ExchangeServicer, handover: HandoverServicer) -> None:
        self._exchange = exchange
        self._handover = handover

    async def Exchange(self, request_iterator: Any, context: Any) -> None:  # noqa: ANN401  # grpc's
        if self._exchange is None:
            raise UnavailableError(LOADING)
        await self._exchange.Exchange(request_iterator, context)

    async def Locate(self, request: Any, context: Any) -> Any:  # noqa: ANN401  # grpc's
        if self._exchange is None:
            raise UnavailableError(LOADING)
        return await self._exchange.Locate(request, context)

    async def Handover(self, request_iterator: Any, context: Any) -> None:  # noqa: ANN401  # grpc's
        if self._handover is None:
            raise UnavailableError(LOADING)
        await self._handover.Handover(request_iterator, context)

    async def close(self) -> None:
        """End all handovers and exchanges."""
        if self._handover is not None:
            await self._handover.close()
        if self._exchange is not None:
            await self._exchange.close()
