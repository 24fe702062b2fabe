"""What an attention group keeps of a sequence that has left it, as gateway and groups name it.

Knows numbers only: whose the blocks are and how they travel is the attention tier's business.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParkedKv:
    """Keys and values of a parked sequence's first `num_tokens`, in the blocks of its group that
    block_ids names; none where they could not be kept."""

    num_tokens: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KvSource:
    """Which group has parked a sequence: its dp_rank, and its tp_rank 0's instance epoch."""

    dp_rank: int
    instance_epoch: int
    parked: ParkedKv
