"""A served cluster that traces and logs JSON: spans of all three processes, and every line."""

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest

from moe_core.pb.epserve.v1 import gateway_pb2_grpc
from support.otlp_collector import Collector, collecting
from support.processes import epserve, serving, started
from support.served_cluster import DEADLINE_S, greedy

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TOKENS = 6
MOE_LAYERS = 3
OUR_FAILURES = ("ended", "the drain failed", "a method failed", "a stream failed")
LAYOUT = ("--expert-devices", "2", "--ep-size", "2", "--kv-cache-tokens", "1024")


@dataclass
class Run:
    collector: Collector
    lines: list[str]
    status: int


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One request with a traceparent, one without and one that asks for no trace."""
    with (
        collecting() as collector,
        serving(*LAYOUT, "--log-json", "--otlp-traces-endpoint", collector.endpoint) as (
            process,
            target,
        ),
        grpc.insecure_channel(target) as channel,
    ):
        stub = gateway_pb2_grpc.GatewayStub(channel)
        for traceparent in (f"00-{TRACE}-{PARENT}-01", "", f"00-{'1' * 32}-{PARENT}-00"):
            metadata = [("traceparent", traceparent)] if traceparent else []
            list(stub.Generate(greedy([5, 6, 7], TOKENS), timeout=DEADLINE_S, metadata=metadata))
        process.send(signal.SIGTERM)
        status = process.wait()
        yield Run(collector, process.err, status)


def test_requests_span_is_its_callers_child_and_the_sequences_its_own(run: Run) -> None:
    requests = {span.trace: span for span in run.collector.named("gateway", "generate")}
    assert len(requests) == 2  # the third was not to be traced
    mine = requests[TRACE]
    assert mine.parent == PARENT
    assert mine.events == ("admitted", "first token")
    assert mine.attributes["gen_ai.usage.input_tokens"] == 3
    assert mine.attributes["gen_ai.usage.output_tokens"] == TOKENS
    sequences = run.collector.named("attn", "sequence")
    assert {(s.trace, s.parent) for s in sequences} == {(r.trace, r.id) for r in requests.values()}
    for sequence in sequences:
        assert sequence.events == ("queued", "prefill", "decode")
        assert sequence.attributes["epserve.finish_reason"] == "length"
        assert not sequence.failed


def test_every_step_is_split_and_linked_to_its_requests(run: Run) -> None:
    steps = run.collector.named("attn", "step")
    assert sorted(step.attributes["epserve.step"] for step in steps) == [*range(1, 3 * TOKENS + 1)]
    parts = ("attention", "dispatch", "expert_wait", "combine", "sampling", "other")
    for step in steps:
        total = sum(step.attributes[f"epserve.{part}_s"] for part in parts)
        assert total == pytest.approx(step.seconds, abs=1e-6)
        assert step.attributes["epserve.sequences"] == 1
    requests = {(s.trace, s.id) for s in run.collector.named("gateway", "generate")}
    linked = [step.links for step in steps if step.links]
    assert len(linked) == 2 * TOKENS
    assert {link for links in linked for link in links} == requests


def test_every_run_of_experts_is_a_child_of_its_step(run: Run) -> None:
    steps = {(s.trace, s.id) for s in run.collector.named("attn", "step")}
    runs = run.collector.named("expert", "experts")
    assert {(each.trace, each.parent) for each in runs} == steps
    assert {each.rank for each in runs} == {0, 1}
    assert len(runs) == len(steps) * MOE_LAYERS * 2
    assert {each.attributes["epserve.dispatches"] for each in runs} == {1}


def test_every_line_of_the_log_is_one_object_that_says_who_wrote_it(run: Run) -> None:
    assert run.status == 0
    records = [json.loads(line) for line in run.lines]
    assert {(r["service"], r.get("service_rank")) for r in records} >= {
        ("gateway", 0), ("attn", 0), ("expert", 0), ("expert", 1),
    }  # fmt: skip
    for record in records:
        assert record["level"] in ("info", "warning", "error")  # an exporter in haste may fail
        assert record["event"] not in OUR_FAILURES, record
        assert record["timestamp"]
        assert record["event"]


def test_collector_that_is_not_there_disturbs_nothing() -> None:
    with serving("--otlp-traces-endpoint", "http://127.0.0.1:9", "--kv-cache-tokens", "512") as (
        process,
        target,
    ):
        done = epserve("generate", "--target", target, "--prompt-ids", "1,2", "--max-tokens", "4",
                       "--ignore-eos", "--json")  # fmt: skip
        assert len(json.loads(done.stdout)["token_ids"]) == 4
        process.send(signal.SIGTERM)
        assert process.wait() == 0


def test_refused_settings_are_json_lines_too_and_name_the_endpoint() -> None:
    with started("serve", "--model", "x", "--otlp-traces-endpoint", "localhost") as process:
        assert process.wait() == 2
    assert "otlp_traces_endpoint='localhost'" in process.err[-1]
    done = epserve("attn", "--model", "/nowhere", "--log-json")
    assert done.returncode != 0
    assert "/nowhere" in json.loads(done.stderr.splitlines()[-1])["error"]
