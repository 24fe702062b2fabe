"""Spans of this process, sent to an OpenTelemetry collector.

Knows OTLP over gRPC, its queue and its deadlines. Knows nothing of what a span stands for.
Imported only where `--otlp-traces-endpoint` is given: see `open_spans` in trace_option.py.

A span is made in one piece, when what it tells is over, and put in a bounded queue; a thread of the
exporter's sends it. When the queue is full the oldest span is dropped and a warning logged, so a
collector that is slow or gone costs nothing but its spans.
"""

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import structlog
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from moe_core.trace_context import TraceContext

log = structlog.get_logger(__name__)

QUEUE_SPANS = 8192
BATCH_SPANS = 512
DELAY_MS = 1000
EXPORT_TIMEOUT_S = 5.0
FLUSH_TIMEOUT_S = 3.0
SCOPE = InstrumentationScope("epserve")
Attribute = str | int | float | bool


class Spans:
    """Runs a thread until `close`. `service` and `rank` name the process in every span."""

    def __init__(self, endpoint: str, service: str, rank: int) -> None:
        self._resource = Resource.create(
            {
                "service.name": f"epserve-{service}",
                "service.instance.id": f"{service} {rank}",
                "epserve.rank": rank,
            }
        )
        exporter = OTLPSpanExporter(
            endpoint=endpoint, insecure=endpoint.startswith("http:"), timeout=EXPORT_TIMEOUT_S
        )
        self._processor = BatchSpanProcessor(
            exporter,
            max_queue_size=QUEUE_SPANS,
            schedule_delay_millis=DELAY_MS,
            max_export_batch_size=BATCH_SPANS,
        )
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    def add(
        self,
        name: str,
        context: TraceContext,
        began_s: float,
        ended_s: float,
        *,
        parent: TraceContext | None = None,
        attributes: Mapping[str, Attribute],
        events: Sequence[tuple[str, float]] = (),
        links: Iterable[TraceContext] = (),
        error: str = "",
        serves: bool = False,
    ) -> None:
        """Put a span that is over in the queue. Times are those of time.perf_counter; `serves`
        is for the span of a request that came from outside."""
        status = Status(StatusCode.ERROR, error) if error else Status(StatusCode.UNSET)
        span = ReadableSpan(
            name,
            _span_context(context, is_remote=False),
            None if parent is None else _span_context(parent, is_remote=True),
            self._resource,
            dict(attributes),
            [Event(what, timestamp=self._ns(when)) for what, when in events],
            [Link(_span_context(each, is_remote=True)) for each in links],
            SpanKind.SERVER if serves else SpanKind.INTERNAL,
            status=status,
            start_time=self._ns(began_s),
            end_time=self._ns(ended_s),
            instrumentation_scope=SCOPE,
        )
        self._processor.on_end(span)

    async def close(self) -> None:
        """Send what is queued, for FLUSH_TIMEOUT_S at most; the rest is lost with a warning."""
        flushing = threading.Thread(
            target=self._processor.shutdown, name="flush spans", daemon=True
        )
        flushing.start()
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while flushing.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if flushing.is_alive():
            log.warning("spans were left unsent: the collector is not there or slow")

    def _ns(self, seconds: float) -> int:
        return self._epoch_ns + round(seconds * 1e9)


def _span_context(context: TraceContext, *, is_remote: bool) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT)
    return SpanContext(context.trace_id, context.span_id, is_remote, flags)
