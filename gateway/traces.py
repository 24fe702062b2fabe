"""One span for every request, from its coming to its last chunk.

A RequestObserver. Knows a request's moments and which of them a trace shows. Knows no collector.
"""

import time
from collections.abc import Sequence as Many

from gateway.metrics.requests import error_code
from gateway.observers import NoObserver, RequestWatch
from gateway.requests import Chunk, GenerationRequest, Sequence
from moe_core.service.tracing import Attribute, Spans
from moe_core.trace_context import new_trace, parse_traceparent


class RequestTraces:
    """A client that sends a traceparent decides whether its request is traced; others are."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def watch(self, request: GenerationRequest) -> RequestWatch:
        """See `RequestObserver.watch`."""
        parent = parse_traceparent(request.traceparent)
        if parent is not None and not parent.sampled:
            return NoObserver()
        return _TracedRequest(self._spans, request)


class _TracedRequest:
    def __init__(self, spans: Spans, request: GenerationRequest) -> None:
        self._spans = spans
        self._parent = parse_traceparent(request.traceparent)
        self._context = new_trace() if self._parent is None else self._parent.child()
        self._attributes: dict[str, Attribute] = {"epserve.request_id": request.request_id}
        self._events: list[tuple[str, float]] = []
        self._output_tokens = 0
        self._began = time.perf_counter()
        self.traceparent = self._context.traceparent

    def admitted(self, choices: Many[Sequence], dp_rank: int) -> None:
        self._events.append(("admitted", time.perf_counter()))
        self._attributes |= {
            "epserve.request_id": choices[0].request_id,
            "epserve.dp_rank": dp_rank,
            "epserve.choices": len(choices),
            "gen_ai.usage.input_tokens": len(choices[0].prompt_ids),
        }

    def moved(self, dp_rank: int) -> None:
        self._events.append((f"moved to dp_rank={dp_rank}", time.perf_counter()))

    def queued(self, seconds: float) -> None: ...

    def put_out(self, chunk: Chunk) -> None:
        if not self._output_tokens:
            self._events.append(("first token", time.perf_counter()))
        self._output_tokens += len(chunk.token_ids)

    def ended(self, error: BaseException | None) -> None:
        self._attributes["gen_ai.usage.output_tokens"] = self._output_tokens
        self._spans.add(
            "generate",
            self._context,
            self._began,
            time.perf_counter(),
            parent=self._parent,
            attributes=self._attributes,
            events=self._events,
            error="" if error is None else f"{error_code(error)}: {error}",
            serves=True,
        )
