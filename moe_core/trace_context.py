"""W3C trace context: which span of which trace something belongs to.

Knows the `traceparent` header and how a step's span is named. Knows no spans and no exporter
(moe_core/service/tracing.py does), so it costs nothing where tracing is off.
"""

import hashlib
import random
import re
from collections.abc import Mapping
from typing import NamedTuple

HEADER = "traceparent"
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_INVALID_VERSION = "ff"


class TraceContext(NamedTuple):
    """A span: 128-bit trace id, 64-bit span id, and whether the trace is recorded."""

    trace_id: int
    span_id: int
    sampled: bool = True

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.sampled):02x}"

    def child(self) -> "TraceContext":
        """A new span of the same trace."""
        return TraceContext(self.trace_id, random.getrandbits(64) or 1, self.sampled)


def new_trace() -> TraceContext:
    return TraceContext(random.getrandbits(128) or 1, random.getrandbits(64) or 1)


def parse_traceparent(header: str) -> TraceContext | None:
    """None for an empty header and, as W3C wants it, for one that is not well formed."""
    found = _FORM.fullmatch(header)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == _INVALID_VERSION or (version == "00" and more):
        return None
    context = TraceContext(int(trace_id, 16), int(span_id, 16), bool(int(flags, 16) & 1))
    return context if context.trace_id and context.span_id else None


def traceparent_of(headers: Mapping[str, str]) -> str:
    """The header of an HTTP request, or nothing; names in `headers` are in lower case."""
    return headers.get(HEADER, "")


def step_context(instance_epoch: int, step: int) -> TraceContext:
    """The span of one step of one attention process. Both tiers derive the same, so a dispatch
    need not carry it."""
    name = f"{instance_epoch}/{step}".encode()
    digest = hashlib.blake2b(name, digest_size=24).digest()
    return TraceContext(int.from_bytes(digest[:16]), int.from_bytes(digest[16:]))
