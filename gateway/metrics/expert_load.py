"""Which experts the tokens go to, as few Prometheus series.

Knows the expert loads in a ClusterState. A large model has 15,000 experts; so a layer shows its
sum, its largest, how uneven it is and its HOTTEST experts, and the page of the gateway shows all.
"""

import heapq
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from moe_core.cluster import ClusterState, Role

HOTTEST = 8


def expert_families(state: ClusterState, model_name: str) -> Iterator[Metric]:
    """Totals since the attention processes began; those that have left are not in them."""
    total = CounterMetricFamily(
        "epserve_expert_tokens",
        "Choices of an expert by a token, by MoE layer and attention group.",
        labels=("model_name", "layer", "dp_rank"),
    )
    for member in state.tier(Role.ATTN):
        if (load := member.expert_load) is not None:
            for layer_id, tokens in zip(load.layer_ids, load.tokens, strict=True):
                where = (model_name, str(layer_id), str(member.dp_rank))
                total.add_metric(where, sum(tokens))
    yield total
    yield from _per_layer(state, model_name)


def _per_layer(state: ClusterState, model_name: str) -> Iterator[Metric]:
    labels = ("model_name", "layer")
    most = GaugeMetricFamily(
        "epserve_expert_tokens_max", "Of those, the hottest expert's.", labels=labels
    )
    imbalance = GaugeMetricFamily(
        "epserve_expert_imbalance", "The hottest expert's over the mean expert's.", labels=labels
    )
    hottest = GaugeMetricFamily(
        "epserve_expert_hottest_tokens",
        "Choices of a layer's hottest experts, rank 1 first.",
        labels=(*labels, "rank"),
    )
    who = GaugeMetricFamily(
        "epserve_expert_hottest_id",
        "Logical ids of a layer's hottest experts, rank 1 first.",
        labels=(*labels, "rank"),
    )
    for layer_id, tokens in _summed(state).items():
        where = (model_name, str(layer_id))
        ranked = heapq.nlargest(HOTTEST, range(len(tokens)), key=tokens.__getitem__)
        most.add_metric(where, tokens[ranked[0]])
        if mean := sum(tokens) / len(tokens):
            imbalance.add_metric(where, tokens[ranked[0]] / mean)
        for rank, expert in enumerate(ranked, 1):
            hottest.add_metric((*where, str(rank)), tokens[expert])
            who.add_metric((*where, str(rank)), expert)
    yield from (most, imbalance, hottest, who)


def _summed(state: ClusterState) -> dict[int, list[int]]:
    """Tokens by logical expert, by layer id, over all attention groups."""
    layers: dict[int, list[int]] = {}
    for member in state.tier(Role.ATTN):
        if (load := member.expert_load) is None:
            continue
        for layer_id, tokens in zip(load.layer_ids, load.tokens, strict=True):
            before = layers.get(layer_id)
            layers[layer_id] = (
                list(tokens)
                if before is None
                else [one + more for one, more in zip(before, tokens, strict=True)]
            )
    return layers
