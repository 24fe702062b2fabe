"""An engine's work as spans: one for each sequence and one for each step.

An EngineObserver. Knows what a sequence and a step have to tell. Knows no collector.
"""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import asdict

from attn_service.sequence import FinishReason, Sequence
from attn_service.step_times import StepTimes
from attn_service.tensor_parallel import GroupRank
from moe_core.service.tracing import Spans
from moe_core.trace_context import TraceContext, parse_traceparent, step_context

MOST_LINKS = 32  # of a step to requests
_NO_SPLIT = ("steps", "step_s")


class EngineTraces:
    def __init__(self, spans: Spans, instance_epoch: int, rank: GroupRank) -> None:
        self._spans = spans
        self._instance_epoch = instance_epoch
        self._ranks = {"epserve.dp_rank": rank.dp_rank, "epserve.tp_rank": rank.tp_rank}

    def stepped(self, step: int, sequences: Many[Sequence], times: StepTimes) -> None:
        """See `EngineObserver.stepped`."""
        now = time.perf_counter()
        split = {
            f"epserve.{name}": seconds
            for name, seconds in asdict(times).items()
            if name not in _NO_SPLIT
        }
        self._spans.add(
            "step",
            step_context(self._instance_epoch, step),
            now - times.step_s,
            now,
            attributes={
                "epserve.step": step,
                **self._ranks,
                **({"epserve.sequences": len(sequences)} if sequences else {}),
                "epserve.other_s": times.other_s,
                **split,
            },
            links=tuple(_traced(sequences))[:MOST_LINKS],
        )

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        """See `EngineObserver.ended`."""
        for parent in _traced([sequence]):
            moments = (
                ("queued", sequence.added_s),
                ("prefill", sequence.started_s),
                ("decode", sequence.first_token_s),
            )
            self._spans.add(
                "sequence",
                parent.child(),
                sequence.added_s,
                time.perf_counter(),
                parent=parent,
                attributes={
                    "epserve.sequence_id": sequence.request.sequence_id,
                    **self._ranks,
                    "epserve.finish_reason": str(reason),
                    "epserve.cached_tokens": sequence.num_cached_prompt_tokens,
                    "gen_ai.usage.input_tokens": len(sequence.request.prompt_ids),
                    "gen_ai.usage.output_tokens": sequence.num_output_tokens,
                },
                events=[(name, when) for name, when in moments if when is not None],
                error="error" if reason is FinishReason.ERROR else "",
            )


def _traced(sequences: Many[Sequence]) -> Iterator[TraceContext]:
    """The gateway's spans of those that are traced."""
    for sequence in sequences:
        context = parse_traceparent(sequence.request.traceparent)
        if context is not None and context.sampled:
            yield context
