"""An OTLP collector in this process that keeps every span it is sent.

Knows the collector's one gRPC method. Knows no span's meaning.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """Ids are hexadecimal; `parent` is empty for a root."""

    service: str
    rank: int
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    events: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    seconds: float
    failed: bool


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.endpoint = ""

    def Export(self, request: Any, context: Any) -> Any:  # noqa: ANN401
        for group in request.resource_spans:
            resource = _values(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans += [_span(resource, each) for each in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, service: str, name: str) -> list[Span]:
        return [s for s in self.spans if (s.service, s.name) == (f"epserve-{service}", name)]


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens at its `endpoint`."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(1).wait()


def _span(resource: dict[str, Any], message: Any) -> Span:  # noqa: ANN401
    return Span(
        service=resource["service.name"],
        rank=resource["epserve.rank"],
        name=message.name,
        trace=message.trace_id.hex(),
        id=message.span_id.hex(),
        parent=message.parent_span_id.hex(),
        attributes=_values(message.attributes),
        events=tuple(event.name for event in message.events),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in message.links),
        seconds=(message.end_time_unix_nano - message.start_time_unix_nano) / 1e9,
        failed=message.status.code == 2,
    )


def _values(attributes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
