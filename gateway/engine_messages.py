"""What the gateway and an engine say to each other of one sequence, as messages.

Knows the fields of attention.proto. Knows no stream.
"""

from collections.abc import Iterable

from gateway.request_stream import Delta
from gateway.requests import Sequence, TokenLogprobs
from moe_core.parked_kv import KvSource, ParkedKv
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1 import logprobs_pb2


def add_to_pb(sequence: Sequence, take_over: bool) -> pb.AddSequence:
    return pb.AddSequence(
        sequence_id=sequence.sequence_id,
        prompt_ids=sequence.prompt_ids,
        priority=sequence.priority,
        traceparent=sequence.traceparent,
        output_ids=sequence.output_ids,
        take_over=take_over,
        kv_source=_source_to_pb(sequence.kv_source),
        sampling=pb.EngineSampling(
            max_tokens=sequence.max_tokens,
            temperature=sequence.temperature,
            top_p=sequence.top_p,
            top_k=sequence.top_k,
            min_p=sequence.min_p,
            seed=sequence.seed,
            index=sequence.index,
            stop_token_ids=sequence.stop_token_ids,
            min_tokens=sequence.min_tokens,
            repetition_penalty=sequence.repetition_penalty,
            presence_penalty=sequence.presence_penalty,
            frequency_penalty=sequence.frequency_penalty,
            logit_bias=sequence.logit_bias,
            logprobs=sequence.logprobs,
            prompt_logprobs=sequence.prompt_logprobs,
        ),
    )


def _source_to_pb(source: KvSource | None) -> pb.KvSource | None:
    if source is None:
        return None
    parked = source.parked
    return pb.KvSource(
        dp_rank=source.dp_rank,
        instance_epoch=source.instance_epoch,
        parked=pb.ParkedKv(num_tokens=parked.num_tokens, block_ids=parked.block_ids),
    )


def parked_from_pb(output: pb.SequenceOutput) -> ParkedKv:
    return ParkedKv(output.parked.num_tokens, tuple(output.parked.block_ids))


def delta_from_pb(output: pb.SequenceOutput, with_logprobs: bool) -> Delta:
    """Costs every token: what most of them lack is only looked for, and logprobs only where they
    were asked for."""
    return Delta(
        tuple(output.token_ids[:]),  # the slice copies at once, the tuple alone one by one
        output.finish_reason,
        _logprobs(output.logprobs) if with_logprobs else (),
        output.num_cached_tokens,
        output.queued_us * 1e-6 if output.HasField("queued_us") else None,
        _logprobs(output.prompt_logprobs) if with_logprobs else (),
    )


def _logprobs(entries: Iterable[logprobs_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            each.token_id,
            each.logprob,
            each.rank,
            tuple(each.top_token_ids),
            tuple(each.top_logprobs),
        )
        for each in entries
    )
