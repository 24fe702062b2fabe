"""The state of a cluster as Prometheus metric families.

Pure functions of a ClusterState: what every process has reported, with the same names as vLLM's
where vLLM has the same thing. Knows no request and no exposition format.

The number of series is bounded: by processes, by pairs of them, and for experts by layers times
HOTTEST, never by layers times experts.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from moe_core.cluster import (
    AttentionLoad,
    ClusterState,
    EngineMetrics,
    LinkStats,
    MemberState,
    Role,
)

# As in EngineMetrics, where each has _s behind it.
STEP_PARTS = ("attention", "dispatch", "expert_wait", "combine", "sampling", "other")
EXPERT_PARTS = ("queue", "compute")
LoadRow: TypeAlias = tuple[str, str, Callable[[AttentionLoad], float]]
EngineRow: TypeAlias = tuple[str, str, Callable[[EngineMetrics], float]]
LOADS: tuple[LoadRow, ...] = (
    ("num_requests_running", "Sequences that steps compute.",
     lambda load: load.num_running),
    ("num_requests_waiting", "Sequences that wait for their first step.",
     lambda load: load.num_waiting),
    ("kv_cache_usage_perc", "Used part of the KV blocks; 1 is all of them.",
     lambda load: 1 - load.free_kv_blocks / load.total_kv_blocks if load.total_kv_blocks else 0.0),
    ("kv_cache_tokens", "Tokens that all KV blocks of the group hold.",
     lambda load: load.total_kv_blocks * load.kv_block_size),
)  # fmt: skip
ENGINES: tuple[EngineRow, ...] = (
    ("num_preemptions", "Sequences that lost their KV blocks to another.",
     lambda metrics: metrics.preemptions),
    ("prefix_cache_queries", "Tokens of admitted requests.",
     lambda metrics: metrics.prefix_query_tokens),
    ("prefix_cache_hits", "Tokens of admitted requests that were in the KV cache.",
     lambda metrics: metrics.prefix_hit_tokens),
    ("handed_over_tokens", "Tokens whose KV blocks came from a group that drained.",
     lambda metrics: metrics.handed_over_tokens),
    ("recomputed_tokens", "Tokens that such a group had computed, and that were computed again.",
     lambda metrics: metrics.recomputed_tokens),
    ("steps", "Steps of the engine.", lambda metrics: metrics.steps),
    ("step_seconds", "Seconds of those steps.", lambda metrics: metrics.step_s),
)  # fmt: skip
LINKS = (
    ("dispatches", "Messages of tokens to an expert process."),
    ("dispatch_tokens", "Tokens sent to an expert process, counted in every layer."),
    ("dispatch_bytes", "Hidden states sent to an expert process, in bytes."),
    ("combine_bytes", "Partial sums that came back from it, in bytes."),
    ("routing_bytes", "Expert ids and weights sent with them, in bytes."),
    ("stream_tensor_bytes", "Tensor bytes that travelled inside gRPC messages."),
    ("doorbells", "Wake-ups sent to a peer that slept."),
)


def cluster_families(state: ClusterState, model_name: str) -> Iterator[Metric]:
    """All families of one moment's state; processes that have reported nothing have no series."""
    yield from _members(state)
    yield from _engines(state, model_name)
    yield from _links(state)


def _members(state: ClusterState) -> Iterator[Metric]:
    epoch = GaugeMetricFamily("epserve_placement_epoch", "Which placement of experts is in use.")
    epoch.add_metric((), state.placement.epoch)
    yield epoch
    there = GaugeMetricFamily(
        "epserve_members", "Processes, by tier and state.", labels=("role", "state")
    )
    wanted = GaugeMetricFamily(
        "epserve_members_configured", "Processes of a tier as configured.", labels=("role",)
    )
    for role in Role:
        found = [member.state for member in state.tier(role)]
        for member_state in MemberState:
            there.add_metric((role, member_state), found.count(member_state))
        wanted.add_metric((role,), state.size(role))
    tasks = GaugeMetricFamily(
        "epserve_event_loop_tasks", "Tasks of a process's event loop.", labels=("role", "rank")
    )
    for member in state.members:
        tasks.add_metric((member.role, str(member.rank)), member.loop_tasks)
    yield from (there, wanted, tasks)


def _engines(state: ClusterState, model_name: str) -> Iterator[Metric]:
    labels = ("model_name", "dp_rank")
    tier = state.tier(Role.ATTN)
    loads = [((model_name, str(each.dp_rank)), each.attention_load) for each in tier]
    for name, text, value in LOADS:
        metric = GaugeMetricFamily(f"epserve_{name}", text, labels=labels)
        for where, load in loads:
            if load is not None:
                metric.add_metric(where, value(load))
        yield metric
    engines = [((model_name, str(each.dp_rank)), each.engine_metrics) for each in tier]
    reported = [(where, metrics) for where, metrics in engines if metrics is not None]
    for name, text, total in ENGINES:
        counter = CounterMetricFamily(f"epserve_{name}", text, labels=labels)
        for where, metrics in reported:
            counter.add_metric(where, total(metrics))
        yield counter
    parts = CounterMetricFamily(
        "epserve_step_part_seconds",
        "Seconds of the steps, by what they went to; all parts together are the steps.",
        labels=(*labels, "part"),
    )
    experts = CounterMetricFamily(
        "epserve_expert_seconds",
        "What the slowest expert process of each dispatch reported, by what it went to.",
        labels=(*labels, "part"),
    )
    for where, metrics in reported:
        for part in STEP_PARTS:
            parts.add_metric((*where, part), getattr(metrics, f"{part}_s"))
        for part in EXPERT_PARTS:
            experts.add_metric((*where, part), getattr(metrics, f"expert_{part}_s"))
    yield from (parts, experts)


def _links(state: ClusterState) -> Iterator[Metric]:
    links: list[LinkStats] = [link for each in state.tier(Role.ATTN) for link in each.links]
    for name, text in LINKS:
        counter = CounterMetricFamily(
            f"epserve_link_{name}", text, labels=("source", "target", "transport")
        )
        for link in links:
            where = (link.source, link.target, link.transport)
            counter.add_metric(where, getattr(link, name))
        yield counter
    wait = CounterMetricFamily(
        "epserve_link_wait_seconds",
        "Seconds that an attention process waited for this expert process and no other.",
        labels=("source", "target", "transport"),
    )
    for link in links:
        wait.add_metric((link.source, link.target, link.transport), link.wait_s)
    yield wait
