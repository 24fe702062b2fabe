"""How many micro-batches a step is computed in, and which sequences each of them takes.

While one micro-batch waits for its experts, another computes attention. Knows token counts;
knows no layers, no experts and no tensors.

Invariant: every slice of a step is in exactly one micro-batch, whole. They may be computed in any
order, since no slice reads keys and values that another slice of the same step writes: a block is
shared only once a step has filled it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from attn_service.sequence import SequenceSlice
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.exchange import MAX_MICROBATCHES

AUTO = "auto"
CHOICES = (AUTO, *(str(count) for count in range(1, MAX_MICROBATCHES + 1)))
AUTO_COUNT = 2
# Each micro-batch reads the weights that its tokens need, of this tier and of the experts, so two
# read most of them twice. That pays only where computing with them takes longer than reading them:
# far from decode with few sequences. See docs/decisions/0007.
AUTO_MIN_TOKENS = 256
AUTO_MIN_TOKENS_PER_EXPERT = 32


@dataclass(frozen=True, slots=True)
class MicrobatchRule:
    """`wanted` micro-batches in every step, fewer only where a step has fewer sequences; None takes
    two where each then has at least `min_tokens` tokens, else one."""

    wanted: int | None
    min_tokens: int = 1

    @classmethod
    def of(
        cls, setting: str, model: ModelConfig, parallel: ParallelConfig, *, shares_device: bool
    ) -> "MicrobatchRule":
        """`setting` is one of CHOICES. shares_device: an expert process computes on this process's
        device, where nothing idles while this process waits."""
        if setting != AUTO:
            return cls(int(setting))
        if shares_device:
            return ALWAYS_ONE
        # An expert's tokens come from all DP groups, which are as busy as this one.
        moe = model.moe
        picks = AUTO_MIN_TOKENS_PER_EXPERT * moe.num_experts
        per_group = -(-picks // (moe.num_experts_per_tok * parallel.dp_size))
        return cls(None, max(AUTO_MIN_TOKENS, per_group))

    def count(self, slices: Sequence[SequenceSlice]) -> int:
        """Of a step that computes `slices`, of which there is at least one."""
        if self.wanted is not None:
            return min(self.wanted, len(slices))
        tokens = [len(part.token_ids) for part in slices]
        if len(slices) < AUTO_COUNT or sum(tokens) < AUTO_COUNT * self.min_tokens:
            return 1
        halves = split(slices, AUTO_COUNT)
        smallest = min(sum(tokens[i] for i in half) for half in halves)
        return AUTO_COUNT if smallest >= self.min_tokens else 1


ALWAYS_ONE = MicrobatchRule(1)


def split(slices: Sequence[SequenceSlice], count: int) -> list[list[int]]:
    """`count` lists of indices into `slices`, each in ascending order and none empty, of about as
    many tokens each: the longest slice first, always to the list with the fewest tokens.

    Equal slices give equal lists, so the ranks of a group agree. Raises ValueError where there are
    not as many slices.
    """
    if not 1 <= count <= len(slices):
        raise ValueError(f"{count} micro-batches of {len(slices)} sequences")
    lists: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for index in sorted(range(len(slices)), key=lambda i: -len(slices[i].token_ids)):
        lightest = tokens.index(min(tokens))
        lists[lightest].append(index)
        tokens[lightest] += len(slices[index].token_ids)
    return [sorted(indices) for indices in lists]


def check_setting(value: str) -> None:
    """Raises ConfigError."""
    if value not in CHOICES:
        raise ConfigError("microbatches", value, f"must be one of {', '.join(CHOICES)}", CHOICES)
