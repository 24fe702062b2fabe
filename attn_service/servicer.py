"""AttentionService: the gateway's sequences in, one message of new tokens per step out.

Knows the messages of attention.proto and one Engine. Knows no scheduling and no model. The
Follow half of the service is follow.py's.

A stream that its gateway ends (no more requests, then the last output) is over. One that breaks is
lost: its sequences run on for a while, see engine_stream.py.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from attn_service.engine import Engine
from attn_service.engine_stream import EngineStream
from attn_service.follow import Followers
from attn_service.sequence import (
    FinishReason,
    Sampling,
    SequenceOutput,
    SequenceRequest,
    StepOutput,
    TokenLogprobs,
)
from moe_core.errors import EpserveError, RequestError, UnavailableError
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1 import attention_pb2_grpc as pb_grpc
from moe_core.pb.epserve.v1 import logprobs_pb2

SERVICE_NAME = "epserve.v1.AttentionService"
MAX_FOUND = 64  # the most choices that a request has
add_to_server = pb_grpc.add_AttentionServiceServicer_to_server


class AttentionServicer(pb_grpc.AttentionServiceServicer):
    """Answers UNAVAILABLE until it is told what this rank does: a server must have its port, and
    so its servicers, before the process knows its rank."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._followers: Followers | None = None
        self._otherwise: EpserveError = UnavailableError("this attention process is starting")

    def lead(self, engine: Engine) -> None:
        """Serve sequences with `engine`. Who is to follow has been accepted before."""
        self._engine = engine
        self._otherwise = RequestError("this attention process is alone in its group: none follow")

    def accept(self, followers: Followers) -> None:
        """Let the other ranks of the group follow."""
        self._followers = followers

    def decline(self, reason: str) -> None:
        """Refuse both calls."""
        self._otherwise = RequestError(reason)

    async def Serve(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # noqa: ANN401
        if self._engine is None:
            raise self._otherwise
        stream = self._engine.open_stream()
        reading = asyncio.create_task(_read(request_iterator, stream), name="serve-requests")
        try:
            async for output in stream.outputs():
                await context.write(output_to_pb(output))
            if not stream.is_lost:
                stream.close()
        finally:
            stream.lose()
            reading.cancel()
            await asyncio.wait({reading})
        if not reading.cancelled():
            reading.result()

    async def Find(self, request: Any, context: Any) -> Any:  # noqa: ANN401
        if self._engine is None:
            raise self._otherwise
        if len(request.sequence_ids) > MAX_FOUND:
            raise RequestError(
                f"sequence_ids: at most {MAX_FOUND} ids, not {len(request.sequence_ids)}"
            )
        known = map(self._engine.find, request.sequence_ids)
        return pb.FindResponse(
            sequences=[
                pb.FoundSequence(
                    sequence_id=each.sequence.request.sequence_id,
                    seed=each.sequence.request.sampling.seed,
                )
                for each in known
                if each is not None
            ]
        )

    async def Follow(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # noqa: ANN401
        if self._followers is None:
            raise self._otherwise
        await self._followers.serve(request_iterator, context)


async def _read(requests: AsyncIterator[Any], stream: EngineStream) -> None:
    try:
        async for request in requests:
            _take(request, stream)
    except EpserveError:
        stream.close()  # what is malformed ends now, not after its sequences
        raise
    except BaseException:
        stream.lose()
        raise
    stream.end_of_requests()


def _take(request: Any, stream: EngineStream) -> None:  # noqa: ANN401
    match request.WhichOneof("kind"):
        case "add":
            try:
                stream.add(request_from_pb(request.add))
            except EpserveError as error:
                stream.refuse(_refusal(request.add.sequence_id, error))
        case "abort":
            stream.abort(request.abort.sequence_id)
        case _:
            raise RequestError("EngineRequest: neither add nor abort is set")


def _refusal(sequence_id: str, error: EpserveError) -> SequenceOutput:
    return SequenceOutput(
        sequence_id,
        finish_reason=FinishReason.ERROR,
        error_code=error.code,
        error=str(error),
        go_elsewhere=isinstance(error, UnavailableError),
    )


def request_from_pb(message: Any) -> SequenceRequest:  # noqa: ANN401
    sampling = message.sampling
    return SequenceRequest(
        sequence_id=message.sequence_id,
        prompt_ids=tuple(message.prompt_ids),
        output_ids=tuple(message.output_ids),
        sampling=Sampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            index=sampling.index,
            stop_token_ids=frozenset(sampling.stop_token_ids),
            min_tokens=sampling.min_tokens,
            repetition_penalty=sampling.repetition_penalty or 1.0,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
            logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
            prompt_logprobs=(
                sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None
            ),
        ),
        priority=message.priority,
        traceparent=message.traceparent,
        take_over=message.take_over,
    )


def output_to_pb(output: StepOutput) -> Any:  # noqa: ANN401
    return pb.StepOutput(
        step=output.step,
        outputs=[
            pb.SequenceOutput(
                sequence_id=each.sequence_id,
                token_ids=each.token_ids,
                finish_reason=each.finish_reason or "",
                error_code=each.error_code,
                error=each.error,
                logprobs=[_logprobs_to_pb(token) for token in each.logprobs],
                num_cached_tokens=each.num_cached_tokens,
                queued_us=each.queued_us,
                go_elsewhere=each.go_elsewhere,
                prompt_logprobs=[_logprobs_to_pb(token) for token in each.prompt_logprobs],
            )
            for each in output.outputs
        ],
    )


def _logprobs_to_pb(token: TokenLogprobs) -> Any:  # noqa: ANN401
    return logprobs_pb2.TokenLogprobs(
        token_id=token.token_id,
        logprob=token.logprob,
        rank=token.rank,
        top_token_ids=token.top_token_ids,
        top_logprobs=token.top_logprobs,
    )
