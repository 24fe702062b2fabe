"""A cluster and its requests, as a scrape shows them; no process and no socket."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics.exposition import Scrape, render
from gateway.metrics.requests import RequestMetrics
from gateway.requests import Chunk, GenerationRequest, Sampling, Sequence, Usage
from moe_core.cluster import (
    AttentionLoad,
    ClusterState,
    EngineMetrics,
    ExpertLoad,
    Join,
    LinkStats,
    MemberState,
    Role,
    StatusReport,
)
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from support.small_gateway import FINGERPRINT, make_registry

PARALLEL = ParallelConfig(attn_devices=2, dp_size=2, expert_devices=2)
REQUEST = GenerationRequest("r", "", (1, 2), Sampling())
CHOICE = Sequence("r", (1, 2), 3, 0.0, 1.0, 0, 0.0, 0, (), 0, (), 0)
PART_S = {"attention": 4.0, "dispatch": 1.0, "expert_wait": 2.0, "combine": 0.5, "sampling": 0.25,
          "other": 0.25}  # fmt: skip
ENGINE = EngineMetrics(
    steps=7, step_s=8.0, expert_queue_s=0.5, expert_compute_s=1.5, preemptions=3,
    prefix_query_tokens=100, prefix_hit_tokens=40, handed_over_tokens=30, recomputed_tokens=20,
    **{f"{part}_s": seconds for part, seconds in PART_S.items()},
)  # fmt: skip


def make_state() -> ClusterState:
    """Two attention groups, of which the second has reported nothing."""
    registry = make_registry(PARALLEL)
    for rank in range(2):
        key = registry.join(
            Join(Role.ATTN, "h:1", "cpu", 7, FINGERPRINT, rank + 1, "float32", "here", rank)
        )
        if rank == 0:
            load = AttentionLoad(2, 3, 6, 8, 4, 8)
            links = (LinkStats("attn 0", "expert 1", "nixl", 5, 600, 700, 80, 9, 10, 1.5, 25),)
            report = StatusReport(
                MemberState.READY, attention_load=load, links=links, engine_metrics=ENGINE
            )
            registry.report(key, report)
            registry.lease(key, 0, 12)
            registry.report_expert_load(
                key, ExpertLoad((1, 2), ((0, 1, 2, 3, 4, 5, 6, 19), (0,) * 8))
            )
    return registry.state


def samples(families: Iterable[Metric]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


class Scraped:
    def __init__(self, metrics: RequestMetrics, state: ClusterState) -> None:
        body, _ = render(Scrape(metrics.registry, state, "tiny"))
        self._samples = samples(text_string_to_metric_families(body.decode()))

    def __call__(self, name: str, **labels: str) -> float:
        return self._samples[f"epserve_{name}", frozenset(labels.items())]

    def series(self, name: str) -> int:
        return sum(found == f"epserve_{name}" for found, _ in self._samples)


def observed_requests() -> RequestMetrics:
    """One request of two choices that was served, and three that ended otherwise."""
    metrics = RequestMetrics("tiny", 128)
    served = metrics.watch(REQUEST)
    served.admitted([CHOICE, replace(CHOICE, index=1)], dp_rank=0)
    served.queued(0.4)
    for index in range(2):
        served.put_out(Chunk("r", index, (5,), "a"))
        served.put_out(Chunk("r", index, (6, 7), "b", "length", Usage(2, 3)))
    served.ended(None)
    for error in (UnavailableError("gone"), asyncio.CancelledError(), ValueError("a bug")):
        metrics.watch(REQUEST).ended(error)
    return metrics
