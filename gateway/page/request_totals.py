"""How long clients wait, as totals of which the page makes means.

Knows the names of the metrics that it reads; how they are measured is theirs.
"""

from prometheus_client import CollectorRegistry

# Sample name: name in the document. Seconds, and how many waits they are the sum of.
_SAMPLES = {
    "epserve_time_to_first_token_seconds_sum": "first_token_s",
    "epserve_time_to_first_token_seconds_count": "first_tokens",
    "epserve_inter_token_latency_seconds_sum": "between_tokens_s",
    "epserve_inter_token_latency_seconds_count": "between_tokens",
}


def request_totals(metrics: CollectorRegistry) -> dict[str, float]:
    """Totals since the gateway began; of several models' the sum. Empty where nothing is
    measured."""
    totals: dict[str, float] = {}
    for family in metrics.collect():
        for sample in family.samples:
            if (name := _SAMPLES.get(sample.name)) is not None:
                totals[name] = totals.get(name, 0.0) + sample.value
    return totals
