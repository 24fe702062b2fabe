"""vllm.grpc.engine.VllmEngine, as the third-party gateway smg drives engines by it.

Knows vllm_engine.proto's methods; its messages' fields are vllm_messages.py's business, and the
work is the Generator's. What epserve has no like of answers UNIMPLEMENTED and says why. The whole
cluster is one engine to smg, which balances between engines: dp groups show in GetLoads only.
"""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import grpc.aio

from gateway.admission import check_sizes
from gateway.callers import caller_of_call
from gateway.cluster import Registry
from gateway.generation import Generator
from gateway.groups import Group, usable_groups
from gateway.vllm_messages import ChoiceAnswer, request_from_pb
from moe_core.cluster import MemberState, Role
from moe_core.errors import NotFoundError, UnsupportedError
from moe_core.pb.smg import common_pb2, vllm_engine_pb2_grpc
from moe_core.pb.smg import vllm_engine_pb2 as pb
from moe_core.service.grpc_host import GrpcHost

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

SERVICE = "vllm.grpc.engine.VllmEngine"
SERVER_TYPE = "vllm-grpc"  # what smg takes for an engine that speaks this protocol


class VllmServicer(vllm_engine_pb2_grpc.VllmEngineServicer):
    """`directory` is the model's, where smg finds the tokenizer if it runs on the same host."""

    def __init__(self, generator: Generator, registry: Registry, directory: Path) -> None:
        self._generator = generator
        self._registry = registry
        self._directory = directory
        self._started = time.monotonic()
        self._last_receive_time = 0.0  # seconds since 1970; 0: nothing yet

    def add_to(self, host: GrpcHost) -> None:
        host.add(vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server, self, SERVICE)

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """A choice's tokens as they come if `stream`, and in any case all of them at its end."""
        self._last_receive_time = time.time()
        check_sizes(
            self._generator.model,
            prompt_tokens=len(request.tokenized.input_ids),
            stop=len(request.sampling_params.stop),
            stop_token_ids=len(request.sampling_params.stop_token_ids),
            logit_bias=len(request.sampling_params.logit_bias),
        )
        answers: dict[int, ChoiceAnswer] = {}
        asked = replace(request_from_pb(request), caller=caller_of_call())
        async with aclosing(self._generator.generate(asked)) as chunks:
            async for chunk in chunks:
                if chunk.index not in answers:
                    answers[chunk.index] = ChoiceAnswer(asked)
                answer = answers[chunk.index]
                answer.add(chunk)
                if request.stream and chunk.token_ids:
                    yield answer.newest(chunk)
                if chunk.usage is not None:
                    yield answer.complete(chunk.finish_reason, chunk.usage, chunk.index)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """Requests that are not here have ended already, which is what was wanted; so it is with
        another caller's."""
        caller = caller_of_call()
        for request_id in request.request_ids:
            self._generator.abort(caller, request_id)
        return pb.AbortResponse()

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: Context
    ) -> pb.HealthCheckResponse:
        """The same answer as grpc.health.v1 gives, and why."""
        state = self._registry.state
        (gateway,) = state.tier(Role.GATEWAY)
        if gateway.state is MemberState.READY:
            return pb.HealthCheckResponse(healthy=True, message="ready")
        missing = (*state.missing(Role.ATTN), *state.missing(Role.EXPERT))
        message = "; ".join(missing) or f"this gateway is {gateway.state}"
        return pb.HealthCheckResponse(healthy=False, message=message)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        model = self._generator.model
        path = str(self._directory)
        return pb.GetModelInfoResponse(
            model_path=path,
            is_generation=True,
            max_context_length=model.max_model_len,
            vocab_size=model.config.vocab_size,
            served_model_name=model.name,
            tokenizer_path="" if model.tokenizer is None else path,
            model_type=model.config.model_type,
            eos_token_ids=model.config.eos_token_ids,
            max_req_input_len=model.max_model_len - 1,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(
            active_requests=len(self._generator.under_way),
            last_receive_timestamp=self._last_receive_time,
            uptime_seconds=time.monotonic() - self._started,
            server_type=SERVER_TYPE,
            data_parallel_size=1,
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        """Raises NotFoundError for a dp_rank that cannot take requests now."""
        groups = usable_groups(self._registry.state)
        shown = groups
        if request.HasField("dp_rank"):
            shown = tuple(group for group in groups if group.dp_rank == request.dp_rank)
            if not shown:
                ranks = ", ".join(str(group.dp_rank) for group in groups) or "none"
                raise NotFoundError(f"dp_rank={request.dp_rank}: groups that report: {ranks}")
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=version("epserve"),
            dp_rank_count=len(groups),
            loads=map(_load, shown),
        )

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> NoReturn:
        _refuse("Embed", "the models served here generate text and give no embeddings")

    async def FlushCache(self, request: common_pb2.FlushCacheRequest, context: Context) -> NoReturn:
        _refuse("FlushCache", "cached prefixes make room by themselves and cannot be flushed")

    async def StartProfile(
        self, request: common_pb2.StartProfileRequest, context: Context
    ) -> NoReturn:
        _refuse("StartProfile", "processes are profiled from outside, by py-spy say")

    async def StopProfile(
        self, request: common_pb2.StopProfileRequest, context: Context
    ) -> NoReturn:
        _refuse("StopProfile", "no profile can have been started")

    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: Context
    ) -> NoReturn:
        _refuse("GetTokenizer", "give smg the model directory as --model-path")

    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: Context
    ) -> NoReturn:
        _refuse("SubscribeKvEvents", "KV blocks are not announced; GetLoads shows their use")


def _refuse(method: str, reason: str) -> NoReturn:
    raise UnsupportedError(f"/{SERVICE}/{method} is not served here: {reason}")


def _load(group: Group) -> pb.SchedulerLoad:
    load = group.load
    used_blocks = load.total_kv_blocks - load.free_kv_blocks
    return pb.SchedulerLoad(
        dp_rank=group.dp_rank,
        num_running_reqs=load.num_running,
        num_waiting_reqs=load.num_waiting,
        num_total_reqs=load.num_running + load.num_waiting,
        num_used_tokens=used_blocks * load.kv_block_size,
        max_total_num_tokens=group.kv_tokens,
        token_usage=used_blocks / load.total_kv_blocks,
    )
