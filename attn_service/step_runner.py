"""What an engine asks of whoever computes its steps, and of whoever watches them.

Knows the plan, what comes of it, and no engine.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Protocol

import torch

from attn_service.sequence import FinishReason, Sequence, StepPlan, TokenLogprobs
from attn_service.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class StepResult:
    """logits: [slices that need them, vocab_size], of the last token of each such slice, in the
    plan's order. times: without step_s and sampling_s. lost: indices of slices that could not be
    computed, and for want of which expert; what the others say of them means nothing. told: of
    slices that ask for logprobs, by their index in the plan, one for each token they name."""

    logits: torch.Tensor
    times: StepTimes
    lost: Mapping[int, str] = field(default_factory=dict)
    told: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)


class StepRunner(Protocol):
    async def execute(self, plan: StepPlan) -> StepResult:
        """Raises TransportError when the experts fail the whole step."""


class EngineObserver(Protocol):
    """Who watches an engine. Nothing here may fail or wait."""

    def stepped(self, step: int, sequences: Many[Sequence], times: StepTimes) -> None:
        """A step is over that was not failed by the experts; called after its tokens are out. A
        rank that follows knows no sequences."""

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        """A sequence leaves the engine."""
