"""Where the time of a step goes.

Knows names, units and sums. Knows no layer and no clock but the host's: time.perf_counter, read
between two calls, never a synchronise. On CUDA, where calls only launch kernels, a figure is
therefore the host's time, and the device's shows where the host first waits for it: attention
mostly in `dispatch_s`, since tokens leave once their kernels are done, and the head in
`sampling_s`. step_s, expert_queue_s and expert_compute_s mean the same everywhere.
"""

import operator
from dataclasses import dataclass, fields

from attn_service.experts import ExpertTimes


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of `steps` whole steps; a step that failed is not among them. Seconds, summed over layers
    and micro-batches.

    step_s:           from scheduling to handing out the tokens; the figures below are parts of it
                      except expert_queue_s and expert_compute_s.
    attention_s:      norms, projections, cache and attention, with the group's all-reduce.
    dispatch_s:       planning a layer's dispatches, and until their bytes have left.
    expert_wait_s:    nothing left to compute but what the experts' answers are needed for.
    expert_queue_s, expert_compute_s: what the slowest expert process of each dispatch reported.
                      More than expert_wait_s where other work overlaps them.
    combine_s:        summing partials, and with attention TP gathering them, which waits for the
                      other ranks.
    sampling_s:       the next tokens and their logprobs.
    """

    steps: int = 0
    step_s: float = 0.0
    attention_s: float = 0.0
    dispatch_s: float = 0.0
    expert_wait_s: float = 0.0
    expert_queue_s: float = 0.0
    expert_compute_s: float = 0.0
    combine_s: float = 0.0
    sampling_s: float = 0.0

    @property
    def other_s(self) -> float:
        """Embedding, router, shared expert, dense layers, head, scheduling, plans to followers."""
        parts = (
            self.attention_s, self.dispatch_s, self.expert_wait_s, self.combine_s, self.sampling_s
        )  # fmt: skip
        return self.step_s - sum(parts)

    def __add__(self, more: "StepTimes") -> "StepTimes":
        return StepTimes(*(getattr(self, name) + getattr(more, name) for name in _NAMES))


_NAMES = tuple(field.name for field in fields(StepTimes))


class StepClock:
    """Adds up what a step's parts report while it is computed."""

    __slots__ = ("_experts", "attention_s", "dispatch_s")

    def __init__(self) -> None:
        self.attention_s = 0.0
        self.dispatch_s = 0.0
        self._experts = ExpertTimes()

    def add(self, times: ExpertTimes) -> None:
        self._experts = ExpertTimes(*map(operator.add, self._experts, times))

    @property
    def times(self) -> StepTimes:
        """Without step_s and sampling_s, which are the engine's."""
        wait_s, queue_s, compute_s, combine_s = self._experts
        return StepTimes(
            steps=1,
            attention_s=self.attention_s,
            dispatch_s=self.dispatch_s,
            expert_wait_s=wait_s,
            expert_queue_s=queue_s,
            expert_compute_s=compute_s,
            combine_s=combine_s,
        )
