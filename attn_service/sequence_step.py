"""What one sequence contributes to a step, and what it puts out after it.

Knows one sequence at a time: its slice of the plan, its sampling row, its output. Knows no engine,
no streams and no other sequence.
"""

import time

from attn_service.sampler import NO_TOKEN, SamplingRow
from attn_service.scheduler import Scheduled
from attn_service.sequence import (
    FinishReason,
    Sequence,
    SequenceOutput,
    SequenceSlice,
    TokenLogprobs,
)


def slice_of(item: Scheduled) -> SequenceSlice:
    sequence, start = item.sequence, item.sequence.num_computed_tokens
    return SequenceSlice(
        token_ids=tuple(sequence.token_ids[start : start + item.num_new_tokens]),
        num_computed_tokens=start,
        block_table=tuple(sequence.block_table),
        needs_logits=item.catches_up,
    )


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


def next_output(sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> SequenceOutput:
    if token == NO_TOKEN:
        position = sequence.num_tokens
        return error_output(
            sequence, "INTERNAL", f"the logits for position {position} are not finite"
        )
    reason = sequence.append(token)
    told = () if logprobs is None else (logprobs,)
    sequence.logprobs.extend(told)
    first = sequence.num_output_tokens == len(sequence.request.output_ids) + 1
    if first:
        sequence.first_token_s = time.perf_counter()
    return SequenceOutput(
        sequence.request.sequence_id,
        (token,),
        reason,
        logprobs=told,
        num_cached_tokens=sequence.num_cached_prompt_tokens if first else 0,
        queued_us=sequence.queued_us if first else None,
    )
