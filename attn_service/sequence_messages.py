"""Sequences and their outputs as messages of attention.proto, both ways.

Knows fields, and no call.
"""

from typing import Any

from attn_service.sequence import (
    Sampling,
    SequenceOutput,
    SequenceRequest,
    StepOutput,
    TokenLogprobs,
)
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
    """Costs every token: what most of them lack is not touched."""
    step = pb.StepOutput(step=output.step)
    for each in output.outputs:
        message = step.outputs.add(sequence_id=each.sequence_id, token_ids=each.token_ids)
        if each.finish_reason is not None:
            _say_end(each, message)
        if each.num_cached_tokens:
            message.num_cached_tokens = each.num_cached_tokens
        if each.queued_us is not None:
            message.queued_us = each.queued_us
        if each.logprobs:
            message.logprobs.extend(map(_logprobs_to_pb, each.logprobs))
        if each.prompt_logprobs:
            message.prompt_logprobs.extend(map(_logprobs_to_pb, each.prompt_logprobs))
    return step


def _say_end(output: SequenceOutput, message: Any) -> None:  # noqa: ANN401
    message.finish_reason = output.finish_reason
    message.error_code = output.error_code
    message.error = output.error
    message.go_elsewhere = output.go_elsewhere
    if output.parked is not None:
        message.parked.num_tokens = output.parked.num_tokens
        message.parked.block_ids.extend(output.parked.block_ids)


def _logprobs_to_pb(token: TokenLogprobs) -> Any:  # noqa: ANN401
    return logprobs_pb2.TokenLogprobs(
        token_id=token.token_id,
        logprob=token.logprob,
        rank=token.rank,
        top_token_ids=token.top_token_ids,
        top_logprobs=token.top_logprobs,
    )
