"""W3C headers, and the span ids that both tiers derive."""

import subprocess
import sys

import pytest

from moe_core.errors import ConfigError
from moe_core.service.trace_option import check_traces_endpoint, open_spans
from moe_core.trace_context import (
    TraceContext,
    new_trace,
    parse_traceparent,
    step_context,
    traceparent_of,
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_header_survives_reading_and_writing() -> None:
    header = f"00-{TRACE}-{SPAN}-01"
    context = parse_traceparent(header)
    assert context == TraceContext(int(TRACE, 16), int(SPAN, 16), True)
    assert context.traceparent == header
    unsampled = parse_traceparent(f"00-{TRACE}-{SPAN}-00")
    assert unsampled is not None
    assert unsampled.child().traceparent.endswith("-00")
    assert traceparent_of({"traceparent": header}) == header
    assert traceparent_of({}) == ""


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_header_that_is_not_well_formed_is_ignored(header: str) -> None:
    assert parse_traceparent(header) is None


def test_later_versions_may_have_more_parts() -> None:
    assert parse_traceparent(f"01-{TRACE}-{SPAN}-01-more") is not None


def test_a_steps_span_follows_from_its_process_and_number_alone() -> None:
    assert step_context(5, 1) == step_context(5, 1)
    different = {step_context(5, 1), step_context(5, 2), step_context(6, 1), step_context(51, 1)}
    assert len(different) == 4
    assert new_trace().trace_id != new_trace().trace_id


@pytest.mark.parametrize(
    "endpoint", ["", "localhost:4317", "http://", "http://h", "ftp://h:1", "http://h:x"]
)
def test_endpoint_that_is_no_url_with_a_port_is_refused_by_name(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint=.*http://127\.0\.0\.1:4317"):
        check_traces_endpoint(endpoint)


def test_nothing_of_opentelemetry_is_imported_without_the_option() -> None:
    assert open_spans(None, "gateway", 0) is None
    code = (
        "import sys, gateway.process, expert_service.process, attn_service.process;"
        "sys.exit('opentelemetry' in str(list(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
