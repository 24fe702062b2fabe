"""What an engine counts, as one value that can be reported.

Knows names and units; the engine's parts count, and the engine puts the counts together.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from attn_service.sequence import FinishReason


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """The engine between two steps. num_… and …_kv_blocks are of this moment, the others are
    totals since the engine began.

    prefix_query_tokens: tokens of admitted requests; prefix_hit_tokens: those of them that were
    in the cache. A request that comes back from a preemption is not counted again.
    used_kv_blocks hold tokens of running sequences; cached_kv_blocks are free, and hold tokens
    that a request may still hit. output_tokens: sampled and put out.
    """

    num_running: int
    num_waiting: int
    preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    used_kv_blocks: int
    cached_kv_blocks: int
    total_kv_blocks: int
    output_tokens: int
    finished: Mapping[FinishReason, int]
