"""What the page is told of a cluster: complete for a small one, bounded for a large one."""

import json

from prometheus_client import CollectorRegistry

from gateway.admission import ServedModel
from gateway.cluster import Registry
from gateway.expert_totals import ExpertTotals
from gateway.metrics.requests import RequestMetrics
from gateway.page.document import cluster_document, experts_document, placement_document
from gateway.page.documents import MAX_AGE_S, Documents
from gateway.page.request_totals import request_totals
from gateway.registrations import MemberKey
from gateway.requests import Chunk, GenerationRequest, Sampling, Usage
from moe_core.cluster import (
    AttentionLoad,
    EngineMetrics,
    ExpertLoad,
    Join,
    LinkStats,
    MemberState,
    Role,
    StatusReport,
)
from moe_core.config.parallel import ParallelConfig
from moe_core.placement import ExpertPlacement
from support.moe_configs import moe_model
from support.small_gateway import FINGERPRINT, MODEL, make_registry

SERVED = ServedModel("small", MODEL, None)
PARALLEL = ParallelConfig(
    attn_devices=2, dp_size=2, expert_devices=2, ep_size=2, num_redundant_experts=2
)
LOAD = AttentionLoad(3, 1, free_kv_blocks=6, total_kv_blocks=8, kv_block_size=4, max_num_seqs=8)


def link(source: int, target: int, number: int) -> LinkStats:
    totals = {"dispatch_tokens": 5 * number}
    return LinkStats(
        f"attn {source}", f"expert {target}", "grpc", number, 10, 20, 1, 1, 1, **totals
    )


def join(registry: Registry, role: Role, epoch: int, *links: LinkStats) -> MemberKey:
    """A member that is READY and reports `links`."""
    key = registry.join(Join(role, "h:1", "cpu", 7, FINGERPRINT, epoch, "float32", "here"))
    load = LOAD if role is Role.ATTN else None
    metrics = EngineMetrics(5, *[0.5] * 9, output_tokens=40) if role is Role.ATTN else None
    registry.report(
        key, StatusReport(MemberState.READY, "", "", load, links, engine_metrics=metrics)
    )
    return key


def expert_load(*rows: tuple[int, ...]) -> ExpertLoad:
    return ExpertLoad(MODEL.moe_layer_ids, rows)


def test_a_cluster_is_told_member_by_member_with_those_that_have_not_joined() -> None:
    registry = make_registry(PARALLEL)
    join(registry, Role.ATTN, 2**60 + 1, link(0, 0, 3), link(0, 1, 4))
    join(registry, Role.EXPERT, 2)
    document = cluster_document(registry.state, SERVED, 9, {"first_tokens": 1.0})
    json.dumps(document)
    members = document["members"]
    assert isinstance(members, list)
    assert [(member["name"], member["state"]) for member in members] == [
        ("attn 0", "ready"),
        ("attn 1", "absent"),
        ("expert 0", "ready"),
        ("expert 1", "absent"),
    ]
    assert members[0]["instance_epoch"] == str(2**60 + 1)
    assert document["counts"] == {
        "attn": {"ready": 1, "absent": 1},
        "expert": {"ready": 1, "absent": 1},
    }
    totals = {"transport": "grpc", "dispatch_bytes": 10, "combine_bytes": 20}
    assert document["links"] == [
        {"source": 0, "target": 0, "dispatches": 3, "dispatch_tokens": 15} | totals,
        {"source": 0, "target": 1, "dispatches": 4, "dispatch_tokens": 20} | totals,
    ]
    groups = document["groups"]
    assert isinstance(groups, list)
    assert groups[0]["load"] == {
        "num_running": 3,
        "num_waiting": 1,
        "kv_tokens_used": 8,
        "kv_tokens": 32,
    }
    assert groups[0]["metrics"]["output_tokens"] == 40
    assert groups[1] == {"dp_rank": 1}
    assert (document["expert_load_version"], document["requests"]) == (9, {"first_tokens": 1.0})


def test_a_large_cluster_is_drawn_as_few_nodes_and_links() -> None:
    model = moe_model(num_experts=256, num_heads=64, num_kv_heads=64)
    parallel = ParallelConfig(
        attn_devices=64, dp_size=32, expert_devices=64, ep_size=64, expert_parallel_degree=2
    ).with_model(model)
    registry = make_registry()
    gateway = registry.state.tier(Role.GATEWAY)[0]
    placement = ExpertPlacement.initial(model, parallel)
    registry = Registry(gateway, parallel, placement, FINGERPRINT)
    for rank in range(64):
        join(registry, Role.ATTN, rank + 1, *(link(rank, target, 1) for target in range(64)))
    document = cluster_document(registry.state, SERVED, 0, {})
    nodes, links = document["nodes"], document["links"]
    assert isinstance(nodes, dict)
    assert isinstance(links, list)
    assert len(nodes[Role.ATTN]) == len(nodes[Role.EXPERT]) == 16
    assert nodes[Role.ATTN][1]["name"] == "attn 4–7"
    assert nodes[Role.ATTN][1]["group"] == "dp 2–3"
    assert nodes[Role.EXPERT][15]["states"] == ["absent"] * 4
    assert len(links) == 256
    assert links[0]["dispatch_bytes"] == 4 * 4 * 10
    assert len(json.dumps(document)) < 100_000


def test_a_link_to_a_process_that_is_not_configured_is_left_out() -> None:
    registry = make_registry(PARALLEL)
    join(registry, Role.ATTN, 1, link(0, 7, 3))
    assert cluster_document(registry.state, SERVED, 0, {})["links"] == []


def test_layers_with_the_same_placement_share_a_table_that_names_all_holders() -> None:
    registry = make_registry(PARALLEL)
    document = placement_document(registry.state)
    tables, layers = document["tables"], document["layers"]
    assert isinstance(tables, list)
    assert layers == [(layer_id, 0) for layer_id in MODEL.moe_layer_ids]
    assert len(tables) == 1
    holders = tables[0]
    assert len(holders) == MODEL.moe.num_experts
    assert sum(len(ranks) == 2 for ranks in holders) == PARALLEL.num_redundant_experts
    assert {rank for ranks in holders for rank in ranks} == {0, 1}


def test_expert_load_is_the_sum_of_the_groups_and_starts_anew_with_another_process() -> None:
    registry = make_registry(PARALLEL)
    first, second = join(registry, Role.ATTN, 1), join(registry, Role.ATTN, 2)
    totals = ExpertTotals()
    totals.update(registry.state)
    assert (totals.version, totals.load) == (0, None)
    ones, twos = (1,) * 8, (2,) * 8
    registry.report_expert_load(first, expert_load(ones, twos))
    registry.report_expert_load(second, expert_load(twos, twos))
    totals.update(registry.state)
    registry.report_expert_load(first, expert_load(twos, twos))
    totals.update(registry.state)
    assert experts_document(totals) == {
        "version": 2,
        "sources": ["1", "2"],
        "layer_ids": MODEL.moe_layer_ids,
        "tokens": ((4,) * 8, (4,) * 8),
    }
    totals.update(registry.state)
    assert totals.version == 2
    registry.leave(first)
    totals.update(registry.state)
    assert totals.sources == (2,)
    assert totals.load == expert_load(twos, twos)


def test_viewers_share_one_document_until_it_is_too_old() -> None:
    registry = make_registry(PARALLEL)
    now = 100.0
    documents = Documents(registry, SERVED, CollectorRegistry(), lambda: now)
    first = documents.cluster()
    join(registry, Role.ATTN, 1)
    assert documents.cluster() is first
    now += MAX_AGE_S
    second = documents.cluster()
    assert second.tag != first.tag
    assert b'"ready"' in second.plain
    assert documents.placement() is documents.placement()
    assert documents.experts() is documents.experts()


def test_request_totals_are_read_from_the_metrics_that_the_gateway_keeps() -> None:
    metrics = RequestMetrics("small", 128)
    watch = metrics.watch(GenerationRequest("r", "", (1,), Sampling()))
    for number in range(3):
        usage = Usage(1, 3) if number == 2 else None
        watch.put_out(Chunk("r", 0, (1,), "", "length" if usage else "", usage))
    totals = request_totals(metrics.registry)
    assert (totals["first_tokens"], totals["between_tokens"]) == (1.0, 2.0)
    assert totals["first_token_s"] > 0
    assert totals["between_tokens_s"] > 0
