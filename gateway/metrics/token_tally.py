"""The two metrics that every token counts in: how many there were, and the time between them.

Knows prometheus-client's families. Its own Counter and Histogram lock and check each time, three
times a token; here one thread counts, and whoever collects reads.
"""

from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Many
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenTally(Collector):
    def __init__(self, model_name: str, bounds_s: Many[float]) -> None:
        """`bounds_s`: of the histogram's buckets, rising; the last bucket takes what is longer."""
        self._labels = [model_name]
        self._bounds_s = (*bounds_s, float("inf"))
        self._between = [0] * len(self._bounds_s)
        self._between_s = 0.0
        self._tokens = 0

    def put_out(self, num_tokens: int) -> None:
        """Tokens were given to a client."""
        self._tokens += num_tokens

    def waited(self, seconds: float) -> None:
        """Between two chunks of one choice."""
        self._between[bisect_left(self._bounds_s, seconds)] += 1
        self._between_s += seconds

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "epserve_generation_tokens", "Tokens put out.", labels=["model_name"]
        )
        tokens.add_metric(self._labels, self._tokens)
        yield tokens
        between = HistogramMetricFamily(
            "epserve_inter_token_latency_seconds",
            "Between two chunks of one choice.",
            labels=["model_name"],
        )
        names = map(floatToGoString, self._bounds_s)
        buckets = list(zip(names, accumulate(self._between), strict=True))
        between.add_metric(self._labels, buckets, self._between_s)
        yield between
