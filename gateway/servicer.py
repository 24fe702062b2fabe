"""The public gRPC service: protobuf in, protobuf out, nothing decided here.

Knows gateway.proto and the values of gateway/requests.py.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any, TypeAlias

import grpc.aio

from gateway.admission import check_sizes
from gateway.callers import caller_of_call
from gateway.cluster import Registry
from gateway.expert_totals import ExpertTotals
from gateway.generation import Generator
from gateway.requests import Chunk, GenerationRequest, Sampling, TokenLogprobs
from moe_core import trace_context
from moe_core.pb.epserve.v1 import cluster_pb2, gateway_pb2_grpc, logprobs_pb2
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from moe_core.service.access import sent_metadata
from moe_core.service.cluster_codec import cluster_to_pb
from moe_core.service.grpc_host import GrpcHost

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
OPTIONAL_FIELDS = tuple(
    field.name for field in pb.SamplingParams.DESCRIPTOR.fields if field.has_presence
)


class GatewayServicer(gateway_pb2_grpc.GatewayServicer):
    def __init__(self, generator: Generator, registry: Registry) -> None:
        self._generator = generator
        self._registry = registry
        self._expert_totals = ExpertTotals()

    def add_to(self, host: GrpcHost) -> None:
        host.add(gateway_pb2_grpc.add_GatewayServicer_to_server, self, "epserve.v1.Gateway")

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        check_sizes(
            self._generator.model,
            prompt_tokens=len(request.token_ids.ids),
            stop=len(request.sampling.stop),
            stop_token_ids=len(request.sampling.stop_token_ids),
            logit_bias=len(request.sampling.logit_bias),
            resume_from=len(request.resume_from),
        )
        traceparent = sent_metadata(context, trace_context.HEADER) or ""
        asked = replace(request_from_pb(request), caller=caller_of_call(), traceparent=traceparent)
        async with aclosing(self._generator.generate_batches(asked, chunk_to_pb)) as batches:
            async for batch in batches:
                for message in batch:
                    yield message

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        caller = caller_of_call()
        return pb.AbortResponse(found=self._generator.abort(caller, request.request_id))

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        model = self._generator.model
        card = pb.ModelCard(
            id=model.name,
            model_type=model.config.model_type,
            max_model_len=model.max_model_len,
            vocab_size=model.config.vocab_size,
            has_tokenizer=model.tokenizer is not None,
        )
        return pb.ListModelsResponse(models=[card])

    async def GetCluster(
        self, request: pb.GetClusterRequest, context: Context
    ) -> cluster_pb2.ClusterState:
        state = self._registry.state
        if not request.expert_load:
            return cluster_to_pb(state)
        self._expert_totals.update(state)
        return cluster_to_pb(replace(state, expert_load=self._expert_totals.load))

    async def WatchCluster(
        self, request: pb.WatchClusterRequest, context: Context
    ) -> AsyncIterator[cluster_pb2.ClusterState]:
        async with aclosing(self._registry.versions.states()) as states:
            async for state in states:
                yield cluster_to_pb(state)


def request_from_pb(message: pb.GenerateRequest) -> GenerationRequest:
    prompts: dict[str | None, str | tuple[int, ...] | None] = {
        None: None,
        "text": message.text,
        "token_ids": tuple(message.token_ids.ids),
    }
    return GenerationRequest(
        request_id=message.request_id,
        model=message.model,
        prompt=prompts[message.WhichOneof("prompt")],
        sampling=sampling_from_pb(message.sampling),
        priority=message.priority,
        resume_from=tuple(message.resume_from) or None,
    )


def sampling_from_pb(message: pb.SamplingParams) -> Sampling:
    given = {name: getattr(message, name) for name in OPTIONAL_FIELDS if message.HasField(name)}
    return Sampling(
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=dict(message.logit_bias),
        **given,
    )


def chunk_to_pb(chunk: Chunk) -> pb.GenerateResponse:
    """Costs every token: what most of them lack is not touched."""
    message = pb.GenerateResponse(
        request_id=chunk.request_id, index=chunk.index, token_ids=chunk.token_ids, text=chunk.text
    )
    if chunk.finish_reason:
        message.finish_reason = chunk.finish_reason
    if chunk.usage is not None:
        message.usage.CopyFrom(pb.Usage(**asdict(chunk.usage)))
    if chunk.logprobs:
        message.logprobs.extend(map(_logprobs_to_pb, chunk.logprobs))
    if chunk.prompt_logprobs:
        message.prompt_logprobs.extend(map(_logprobs_to_pb, chunk.prompt_logprobs))
    return message


def _logprobs_to_pb(token: TokenLogprobs) -> logprobs_pb2.TokenLogprobs:
    return logprobs_pb2.TokenLogprobs(**asdict(token))
