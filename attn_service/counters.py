"""What an engine counts, as values that can be reported.

Knows names and units, and where each count is; the engine's parts count.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from attn_service.adoptions import Adoptions
from attn_service.kv_blocks import BlockPool
from attn_service.scheduler import Scheduler
from attn_service.sequence import FinishReason
from attn_service.step_times import StepTimes
from moe_core.cluster import AttentionLoad, EngineMetrics


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


def counters_of(
    scheduler: Scheduler,
    pool: BlockPool,
    output_tokens: int,
    finished: Mapping[FinishReason, int],
) -> EngineCounters:
    cache = scheduler.cache
    return EngineCounters(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        preemptions=scheduler.num_preemptions,
        prefix_query_tokens=cache.num_query_tokens,
        prefix_hit_tokens=cache.num_hit_tokens,
        used_kv_blocks=pool.num_blocks - pool.num_free,
        cached_kv_blocks=pool.num_cached,
        total_kv_blocks=pool.num_blocks,
        output_tokens=output_tokens,
        finished={reason: finished.get(reason, 0) for reason in FinishReason},
    )


def load_of(scheduler: Scheduler, pool: BlockPool, adoptions: Adoptions) -> AttentionLoad:
    return AttentionLoad(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting + len(adoptions.sequences),
        free_kv_blocks=pool.num_free,
        total_kv_blocks=pool.num_blocks,
        kv_block_size=pool.block_size,
        max_num_seqs=scheduler.max_num_seqs,
        hands_over=True,
    )


def metrics_of(counters: EngineCounters, times: StepTimes, adoptions: Adoptions) -> EngineMetrics:
    return EngineMetrics(
        **asdict(times),
        other_s=times.other_s,
        preemptions=counters.preemptions,
        prefix_query_tokens=counters.prefix_query_tokens,
        prefix_hit_tokens=counters.prefix_hit_tokens,
        output_tokens=counters.output_tokens,
        handed_over_tokens=adoptions.handed_over_tokens,
        recomputed_tokens=adoptions.recomputed_tokens,
    )
