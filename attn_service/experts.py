"""The one argument that says who computes a layer's experts, and where.

The model runner awaits `dispatch` and then `combine` between the two halves of a decoder
layer. Knows nothing of processes, placements or wires; expert_client.py does.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepKey:
    """Which step of which placement epoch a dispatch belongs to."""

    placement_epoch: int
    step: int
    microbatch: int = 0


class PendingExperts(Protocol):
    """A layer's tokens on their way. `combine` must be awaited exactly once."""

    async def combine(self) -> Tensor:
        """[num_tokens, hidden_size] in the model's dtype: the experts' outputs, summed over
        expert processes in ascending rank order. Raises TransportError."""


class Experts(Protocol):
    async def dispatch(
        self,
        key: StepKey,
        layer_id: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
    ) -> PendingExperts:
        """Send one MoE layer's tokens. After it returns the tensors may be reused.

        hidden_states: [num_tokens, hidden_size], the model's dtype; equal on all attention TP
        ranks. topk_ids: [num_tokens, top_k] int, logical experts. topk_weights: [num_tokens,
        top_k] float32 (float64 in float64). Raises TransportError.
        """
