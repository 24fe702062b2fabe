"""A small asynchronous client of the Gateway service.

Knows its calls and their deadlines; everything else in this package sees plain values only. Knows
nothing of how a request is served.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from epserve.gateway_connection import GatewayConnection, Target
from epserve.generate_messages import Output, Sampling, output_of, request_message
from moe_core.cluster import ClusterState
from moe_core.errors import PeerTimeoutError
from moe_core.pb.epserve.v1 import gateway_pb2, gateway_pb2_grpc
from moe_core.service.cluster_codec import cluster_from_pb


@dataclass(frozen=True, slots=True)
class Model:
    id: str
    model_type: str
    max_model_len: int
    vocab_size: int
    has_tokenizer: bool


class EpserveClient(GatewayConnection):
    """All calls raise EpserveError subclasses, never gRPC's own."""

    def __init__(self, target: str | Target) -> None:
        super().__init__(target)
        self._stub: Any = gateway_pb2_grpc.GatewayStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        model: str = "",
        request_id: str = "",
        resume_from: Sequence[int] = (),
        idle_timeout_s: float = 120.0,
    ) -> AsyncGenerator[Output, None]:
        """The outputs of all choices as they come. Closing the iterator cancels the request.

        `resume_from`, with the request_id of a request whose gateway was lost: how many tokens of
        each choice came before; the outputs go on after them (see epserve.resuming). Raises
        PeerTimeoutError when nothing arrives for `idle_timeout_s` seconds.
        """
        request = request_message(prompt, sampling, model, request_id, resume_from)
        call = self._stub.Generate(request, metadata=self._metadata)
        answers = aiter(call)
        try:
            while True:
                async with asyncio.timeout(idle_timeout_s):
                    response = await anext(answers, None)
                if response is None:
                    return
                yield output_of(response)
        except TimeoutError:
            raise PeerTimeoutError(
                f"gateway {self.target} sent nothing for {idle_timeout_s} s"
            ) from None
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, "generate") from error
        finally:
            call.cancel()

    async def list_models(self, timeout_s: float = 5.0) -> tuple[Model, ...]:
        try:
            answer = await self._stub.ListModels(
                gateway_pb2.ListModelsRequest(), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, "list models") from error
        return tuple(
            Model(m.id, m.model_type, m.max_model_len, m.vocab_size, m.has_tokenizer)
            for m in answer.models
        )

    async def cluster(self, timeout_s: float = 5.0, *, expert_load: bool = False) -> ClusterState:
        """With `expert_load` also which experts the tokens went to, where that is known."""
        request = gateway_pb2.GetClusterRequest(expert_load=expert_load)
        try:
            answer = await self._stub.GetCluster(
                request, timeout=timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, "get cluster") from error
        return cluster_from_pb(answer)

    async def watch_cluster(self) -> AsyncGenerator[ClusterState, None]:
        """The state now and whenever it has changed, until the gateway ends this in order."""
        call = self._stub.WatchCluster(gateway_pb2.WatchClusterRequest(), metadata=self._metadata)
        try:
            async for answer in call:
                yield cluster_from_pb(answer)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, "watch cluster") from error
        finally:
            call.cancel()
