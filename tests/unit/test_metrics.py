"""What a scrape says of a cluster and of its requests."""

from dataclasses import replace

from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain_text
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gateway.metrics.exposition import metrics_routes
from gateway.metrics.requests import RequestMetrics, token_buckets
from moe_core.cluster import ExpertLoad, Role
from support.scraped import PART_S, Scraped, make_state, observed_requests


def test_engine_and_links_are_shown_with_the_ranks_they_belong_to() -> None:
    value = Scraped(RequestMetrics("tiny", 128), make_state())
    where = {"model_name": "tiny", "dp_rank": "0"}
    assert value("num_requests_running", **where) == 2
    assert value("num_requests_waiting", **where) == 3
    assert value("kv_cache_usage_perc", **where) == 0.25
    assert value("kv_cache_tokens", **where) == 32
    assert value("num_preemptions_total", **where) == 3
    assert value("prefix_cache_queries_total", **where) == 100
    assert value("prefix_cache_hits_total", **where) == 40
    assert value("handed_over_tokens_total", **where) == 30
    assert value("recomputed_tokens_total", **where) == 20
    assert value("steps_total", **where) == 7
    for part, seconds in PART_S.items():
        assert value("step_part_seconds_total", **where, part=part) == seconds
    assert value("step_seconds_total", **where) == sum(PART_S.values())
    assert value("expert_seconds_total", **where, part="compute") == 1.5
    link = {"source": "attn 0", "target": "expert 1", "transport": "nixl"}
    assert value("link_dispatches_total", **link) == 5
    assert value("link_dispatch_bytes_total", **link) == 600
    assert value("link_dispatch_tokens_total", **link) == 25
    assert value("link_combine_bytes_total", **link) == 700
    assert value("link_wait_seconds_total", **link) == 1.5
    assert value.series("num_requests_running") == 1


def test_members_are_counted_by_role_and_state_also_where_there_are_none() -> None:
    value = Scraped(RequestMetrics("tiny", 128), make_state())
    assert value("members", role="attn", state="ready") == 1
    assert value("members", role="attn", state="loading") == 1
    assert value("members", role="expert", state="ready") == 0
    assert value("members", role="gateway", state="connecting") == 1
    assert value("members_configured", role="expert") == 2
    assert value("event_loop_tasks", role="attn", rank="0") == 12
    assert value("event_loop_tasks", role="gateway", rank="0") == 0
    assert value("placement_epoch") == 0


def test_expert_load_shows_each_layers_sum_largest_and_hottest() -> None:
    value = Scraped(RequestMetrics("tiny", 128), make_state())
    layer = {"model_name": "tiny", "layer": "1"}
    assert value("expert_tokens_total", **layer, dp_rank="0") == 40
    assert value("expert_tokens_max", **layer) == 19
    assert value("expert_imbalance", **layer) == 19 / 5
    assert [value("expert_hottest_id", **layer, rank=str(r)) for r in (1, 2, 8)] == [7, 6, 0]
    assert [value("expert_hottest_tokens", **layer, rank=str(r)) for r in (1, 2)] == [19, 6]
    assert value.series("expert_imbalance") == 1  # nothing has gone through the other layer


def test_expert_series_stay_few_in_a_large_model() -> None:
    state = make_state()
    layers = tuple(range(3, 61))
    load = ExpertLoad(layers, tuple(tuple(range(256)) for _ in layers))
    members = tuple(
        replace(member, expert_load=load) if member.role is Role.ATTN else member
        for member in state.members
    )
    value = Scraped(RequestMetrics("tiny", 128), replace(state, members=members))
    assert value.series("expert_hottest_tokens") == 58 * 8
    assert value.series("expert_tokens_total") == 58 * 2
    assert value("expert_tokens_max", model_name="tiny", layer="3") == 2 * 255


def test_requests_are_counted_by_how_they_end() -> None:
    value = Scraped(observed_requests(), make_state())
    assert value("prompt_tokens_total", model_name="tiny") == 2
    assert value("generation_tokens_total", model_name="tiny") == 6
    assert value("request_success_total", model_name="tiny", finished_reason="length") == 2
    assert value("request_success_total", model_name="tiny", finished_reason="stop") == 0
    assert value("time_to_first_token_seconds_count", model_name="tiny") == 1
    assert value("inter_token_latency_seconds_count", model_name="tiny") == 2
    assert value("e2e_request_latency_seconds_count", model_name="tiny") == 4
    assert value("request_queue_time_seconds_sum", model_name="tiny") == 0.4
    assert value("request_generation_tokens_sum", model_name="tiny") == 6
    for code in ("UNAVAILABLE", "CANCELLED", "INTERNAL"):
        assert value("request_errors_total", model_name="tiny", code=code) == 1


def test_token_buckets_end_with_the_context() -> None:
    assert token_buckets(128) == (1, 2, 5, 10, 20, 50, 100)
    assert token_buckets(1) == (1,)


def test_route_answers_both_forms_that_prometheus_asks_for() -> None:
    routes = metrics_routes(RequestMetrics("tiny", 128), make_state, "tiny")
    with TestClient(Starlette(routes=routes)) as client:
        plain = client.get("/metrics")
        asked = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
        opened = client.get("/metrics", headers=asked)
        assert client.post("/metrics").status_code == 405
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in open_metrics(opened.text)}
    plain_names = {family.name for family in plain_text(plain.text)}
    assert names == {name for name in plain_names if not name.endswith("_created")}
    assert "epserve_expert_tokens" in names
