"""What one sequence contributes to a step, and what it puts out after it.

Knows one sequence at a time: its slice of the plan, its sampling row, its output. Knows no engine,
no streams and no other sequence.
"""

import math
import time

from attn_service.sampler import NO_TOKEN, SamplingRow
from attn_service.scheduler import Scheduled
from attn_service.sequence import (
    AskedLogprobs,
    FinishReason,
    Sequence,
    SequenceOutput,
    SequenceSlice,
    TokenLogprobs,
)
from moe_core.parked_kv import ParkedKv


def slice_of(item: Scheduled) -> SequenceSlice:
    sequence, start = item.sequence, item.sequence.num_computed_tokens
    return SequenceSlice(
        token_ids=tuple(sequence.token_ids[start : start + item.num_new_tokens]),
        num_computed_tokens=start,
        block_table=tuple(sequence.block_table),
        needs_logits=item.needs_logits,
        asked_logprobs=_asked(item),
    )


def _asked(item: Scheduled) -> AskedLogprobs | None:
    """Those of the prompt's tokens that follow a row of the slice."""
    sequence, first = item.sequence, item.sequence.num_computed_tokens + 1
    num_top = sequence.request.sampling.prompt_logprobs
    following = sequence.token_ids[first : first + item.num_new_tokens]
    if num_top is None or not sequence.tells_prompt or not following:
        return None
    return AskedLogprobs(tuple(following), num_top)


def take_told(sequence: Sequence, told: tuple[TokenLogprobs, ...]) -> None:
    """What a step has told of the prompt, before its tokens count as computed. What was told of
    tokens that a preemption has thrown away is told again."""
    del sequence.told[sequence.num_computed_tokens :]
    sequence.told += told


def row_of(sequence: Sequence) -> SamplingRow:
    return SamplingRow(
        sequence.request.sampling,
        sequence.num_tokens,
        sequence.num_output_tokens,
        sequence.token_counts,
    )


def error_output(
    sequence: Sequence, code: str, message: str, *, go_elsewhere: bool = False
) -> SequenceOutput:
    return SequenceOutput(
        sequence.request.sequence_id,
        finish_reason=FinishReason.ERROR,
        error_code=code,
        error=message,
        go_elsewhere=go_elsewhere,
    )


def parked_output(sequence: Sequence, parked: ParkedKv) -> SequenceOutput:
    return SequenceOutput(
        sequence.request.sequence_id, finish_reason=FinishReason.PARKED, parked=parked
    )


def next_output(sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> SequenceOutput:
    if token == NO_TOKEN:
        return _not_finite(sequence, sequence.num_tokens)
    if (wrong := _untold(sequence)) is not None:
        return _not_finite(sequence, wrong)
    reason = sequence.append(token)
    told = () if logprobs is None else (logprobs,)
    sequence.logprobs.extend(told)
    if sequence.num_output_tokens > len(sequence.request.output_ids) + 1:
        return SequenceOutput(sequence.request.sequence_id, (token,), reason, logprobs=told)
    sequence.first_token_s = time.perf_counter()
    return _first_output(sequence, (token,), reason, told)


def prompt_output(sequence: Sequence) -> SequenceOutput:
    """Of a sequence that ends with its prompt."""
    if (wrong := _untold(sequence)) is not None:
        return _not_finite(sequence, wrong)
    return _first_output(sequence, (), FinishReason.LENGTH, ())


def _first_output(
    sequence: Sequence,
    token_ids: tuple[int, ...],
    reason: FinishReason | None,
    logprobs: tuple[TokenLogprobs, ...],
) -> SequenceOutput:
    prompt_logprobs, sequence.told = tuple(sequence.told), []
    return SequenceOutput(
        sequence.request.sequence_id,
        token_ids,
        reason,
        logprobs=logprobs,
        num_cached_tokens=sequence.num_cached_prompt_tokens,
        queued_us=sequence.queued_us,
        prompt_logprobs=prompt_logprobs,
    )


def _untold(sequence: Sequence) -> int | None:
    """The position of the first token of the prompt whose logprob is no number."""
    told = enumerate(sequence.told, 1)
    return next((position for position, each in told if not math.isfinite(each.logprob)), None)


def _not_finite(sequence: Sequence, position: int) -> SequenceOutput:
    return error_output(sequence, "INTERNAL", f"the logits for position {position} are not finite")
