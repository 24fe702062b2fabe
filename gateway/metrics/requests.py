"""Counts and times of requests, as Prometheus metrics.

Knows names, labels and buckets, which are vLLM's where vLLM has the same thing. Knows no cluster
(cluster.py does) and no exposition format.
"""

import asyncio
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from itertools import takewhile

from prometheus_client import CollectorRegistry, Counter, Histogram

from gateway.metrics.token_tally import TokenTally
from gateway.observers import RequestWatch
from gateway.requests import Chunk, GenerationRequest, Sequence
from moe_core.errors import EpserveError

FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
WHOLE_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
CANCELLED = "CANCELLED"
INTERNAL = "INTERNAL"


def token_buckets(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 and so on, up to `most`."""

    def numbers() -> Iterator[int]:
        power = 1
        while True:
            yield from (power, 2 * power, 5 * power)
            power *= 10

    return tuple(takewhile(lambda number: number <= most, numbers())) or (1,)


class RequestMetrics:
    """A RequestObserver. Only the event loop's thread observes; any may read `registry`."""

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self.registry = CollectorRegistry()
        self.tally = TokenTally(model_name, BETWEEN_TOKENS_S)
        self.registry.register(self.tally)
        tokens = token_buckets(max_model_len)

        def histogram(name: str, text: str, buckets: Many[float]) -> Histogram:
            family = Histogram(
                f"epserve_{name}", text, ["model_name"], buckets=buckets, registry=self.registry
            )
            return family.labels(model_name)

        def counter(name: str, text: str, *labels: str) -> Counter:
            names = ["model_name", *labels]
            return Counter(f"epserve_{name}", text, names, registry=self.registry)

        self.first_token = histogram(
            "time_to_first_token_seconds", "From a request's coming to its first chunk.",
            FIRST_TOKEN_S,
        )  # fmt: skip
        self.whole = histogram(
            "e2e_request_latency_seconds", "From a request's coming to its end.", WHOLE_REQUEST_S
        )
        self.queue = histogram(
            "request_queue_time_seconds", "From a choice's coming to its engine to its first step.",
            WHOLE_REQUEST_S,
        )  # fmt: skip
        self.prompt_size = histogram(
            "request_prompt_tokens", "Prompt tokens of an admitted request.", tokens
        )
        self.output_size = histogram(
            "request_generation_tokens", "Output tokens of a choice that ended.", tokens
        )
        self.prompt_tokens = counter(
            "prompt_tokens", "Prompt tokens of admitted requests."
        ).labels(model_name)  # fmt: skip
        self._success = counter(
            "request_success", "Choices that ended, by why.", "finished_reason"
        )  # fmt: skip
        self._errors = counter(
            "request_errors", "Requests that ended in an error, by gRPC status name.", "code"
        )
        self.moves = counter(
            "request_moves", "Requests that another attention group went on with."
        ).labels(model_name)  # fmt: skip
        self._model_name = model_name
        for reason in ("stop", "length", "abort"):
            self._success.labels(model_name, reason)

    def watch(self, request: GenerationRequest) -> RequestWatch:
        """See `RequestObserver.watch`."""
        return _Measured(self)

    def finished(self, reason: str) -> None:
        self._success.labels(self._model_name, reason).inc()

    def failed(self, error: BaseException) -> None:
        self._errors.labels(self._model_name, error_code(error)).inc()


class _Measured:
    """One request. `_last`: of each choice, when its last chunk was put out."""

    traceparent = ""

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        self._last: dict[int, float] = {}

    def admitted(self, choices: Many[Sequence], dp_rank: int) -> None:
        num_tokens = len(choices[0].prompt_ids)
        self._metrics.prompt_tokens.inc(num_tokens)
        self._metrics.prompt_size.observe(num_tokens)

    def moved(self, dp_rank: int) -> None:
        self._metrics.moves.inc()

    def queued(self, seconds: float) -> None:
        self._metrics.queue.observe(seconds)

    def put_out(self, chunk: Chunk) -> None:
        metrics, now = self._metrics, time.perf_counter()
        last = self._last.get(chunk.index)
        if last is not None:
            metrics.tally.waited(now - last)
        elif not self._last:
            metrics.first_token.observe(now - self._started)
        self._last[chunk.index] = now
        metrics.tally.put_out(len(chunk.token_ids))
        if chunk.usage is not None:
            metrics.finished(chunk.finish_reason)
            metrics.output_size.observe(chunk.usage.completion_tokens)

    def ended(self, error: BaseException | None) -> None:
        self._metrics.whole.observe(time.perf_counter() - self._started)
        if error is not None:
            self._metrics.failed(error)


def error_code(error: BaseException) -> str:
    """The gRPC status name that says what ended a request; CANCELLED where its client left."""
    if isinstance(error, EpserveError):
        return error.code
    if isinstance(error, GeneratorExit | asyncio.CancelledError):
        return CANCELLED
    return INTERNAL
