"""The one argument that says who computes a layer's experts, and where.

The model runner awaits `dispatch` and then `combine` between the two halves of a decoder
layer. Knows nothing of processes, placements or wires; expert_client.py does.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepKey:
    """Which micro-batch of which step of which placement epoch a dispatch belongs to."""

    placement_epoch: int
    step: int
    microbatch: int = 0


class ExpertTimes(NamedTuple):
    """Of one layer's dispatch, in seconds; see step_times.StepTimes."""

    wait_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    combine_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LostRows:
    """Rows [n] int64 that nobody could compute now, and why: layer, experts and process."""

    rows: Tensor
    reason: str


class Combined(NamedTuple):
    """hidden_states: [num_tokens, hidden_size] in the model's dtype: the experts' outputs, summed
    over expert processes in ascending rank order. lost: of the rows that this rank exchanges, those
    that have no sum; their values mean nothing."""

    hidden_states: Tensor
    times: ExpertTimes
    lost: tuple[LostRows, ...] = ()


class PendingExperts(Protocol):
    """A layer's tokens on their way. Either `combine` is awaited, once, or `release` is called."""

    async def combine(self) -> Combined:
        """Raises TransportError; after that as after a cancelled wait nothing is held any more."""

    def release(self) -> None:
        """The answer is not wanted. Without effect after `combine`."""


class Experts(Protocol):
    async def dispatch(
        self,
        key: StepKey,
        layer_id: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        rows: Tensor | None = None,
    ) -> PendingExperts:
        """Send one MoE layer's tokens. The tensors stay as they are until the answer has been
        combined or released: what a process loses is sent again from them.

        hidden_states: [num_tokens, hidden_size], the model's dtype; equal on all attention TP
        ranks. topk_ids: [num_tokens, top_k] int, logical experts. topk_weights: [num_tokens,
        top_k] float32 (float64 in float64). rows: [n] int64, ascending, those that are to be
        computed (None: all); the others' outputs mean nothing. Raises TransportError.
        """
