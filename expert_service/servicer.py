"""Keeps the door of `ExpertService` while this process has no experts yet.

A process needs an address before it may join, and its rank before it can load. So the server
starts first, and whoever comes too early is told so. Knows nothing of what is exchanged.
"""

from typing import Any

from moe_core.errors import UnavailableError
from moe_core.pb.epserve.v1 import expert_pb2_grpc
from moe_core.service.grpc_host import GrpcHost
from moe_core.transport.servicer import ExchangeServicer

SERVICE_NAME = "epserve.v1.ExpertService"


class ExchangeGate(expert_pb2_grpc.ExpertServiceServicer):
    """Answers UNAVAILABLE until `open`, then hands every exchange to the real servicer."""

    def __init__(self) -> None:
        self._servicer: ExchangeServicer | None = None

    def add_to(self, host: GrpcHost) -> None:
        host.add(expert_pb2_grpc.add_ExpertServiceServicer_to_server, self, SERVICE_NAME)

    def open(self, servicer: ExchangeServicer) -> None:
        self._servicer = servicer

    async def Exchange(self, request_iterator: Any, context: Any) -> None:  # noqa: ANN401  # grpc's
        if self._servicer is None:
            raise UnavailableError("this expert process is still loading its weights")
        await self._servicer.Exchange(request_iterator, context)

    async def close(self) -> None:
        """End all exchanges."""
        if self._servicer is not None:
            await self._servicer.close()
