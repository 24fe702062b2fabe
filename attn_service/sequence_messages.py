"""Sequences and their outputs as messages of attention.proto, both ways.

Knows fields, and no call.
"""

from typing import Any

from attn_service.sequence import Sampling, SequenceRequest, StepOutput, TokenLogprobs
from moe_core.parked_kv import KvSource, ParkedKv
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1 import logprobs_pb2


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
        kv_source=_source_from_pb(message.kv_source) if message.HasField("kv_source") else None,
    )


def _source_from_pb(message: Any) -> KvSource:  # noqa: ANN401
    parked = ParkedKv(message.parked.num_tokens, tuple(message.parked.block_ids))
    return KvSource(message.dp_rank, message.instance_epoch, parked)


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
                parked=_parked_to_pb(each.parked),
            )
            for each in output.outputs
        ],
    )


def _parked_to_pb(parked: ParkedKv | None) -> Any:  # noqa: ANN401
    if parked is None:
        return None
    return pb.ParkedKv(num_tokens=parked.num_tokens, block_ids=parked.block_ids)


def _logprobs_to_pb(token: TokenLogprobs) -> Any:  # noqa: ANN401
    return logprobs_pb2.TokenLogprobs(
        token_id=token.token_id,
        logprob=token.logprob,
        rank=token.rank,
        top_token_ids=token.top_token_ids,
        top_logprobs=token.top_logprobs,
    )
