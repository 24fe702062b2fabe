"""What `epserve top` shows: rates of two states, and what is hot or missing."""

from dataclasses import replace

from rich.console import Console

from epserve.rates import ClusterRates
from epserve.top_frame import frame
from moe_core.cluster import (
    AttentionLoad,
    ClusterState,
    EngineMetrics,
    ExpertLoad,
    LinkStats,
    Member,
    MemberState,
    Role,
)
from moe_core.config.parallel import ParallelConfig
from moe_core.placement import ExpertPlacement
from support.small_gateway import MODEL


def state_after(seconds: int, *, attn_epoch: int = 2, size: int = 1) -> ClusterState:
    """Each second: 10 steps of 20 ms, 30 tokens, 1 MB both ways, 5 dispatches of 1,234 tokens."""
    parallel = ParallelConfig(attn_devices=size, dp_size=size, expert_devices=2, ep_size=2)
    parallel = parallel.with_model(MODEL)
    load = AttentionLoad(
        2, 1, free_kv_blocks=6, total_kv_blocks=8, kv_block_size=16, max_num_seqs=8
    )
    moved = 500_000 * seconds
    link = LinkStats("attn 0", "expert 1", "nixl", 5 * seconds, moved, moved, 0, 0, 0,
                     dispatch_tokens=1_234 * seconds)  # fmt: skip
    metrics = EngineMetrics(10 * seconds, 0.2 * seconds, *[0.0] * 8, output_tokens=30 * seconds)
    gateway = Member(Role.GATEWAY, 0, 1, "h:1", "cpu", MemberState.READY, 1, "here")
    attn = replace(
        gateway,
        role=Role.ATTN,
        instance_epoch=attn_epoch,
        dp_rank=0,
        tp_rank=0,
        attention_load=load,
        engine_metrics=metrics,
        links=(link,),
    )
    expert = replace(gateway, role=Role.EXPERT, rank=1, instance_epoch=9, ep_rank=1, etp_rank=0)
    placement = ExpertPlacement.initial(MODEL, parallel)
    return ClusterState(5, parallel, (gateway, attn, expert), placement)


def shown(state: ClusterState, rates: ClusterRates) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(frame("h:1", state, rates))
    return capture.get()


def test_rates_are_differences_over_the_time_between() -> None:
    before, after = state_after(4), state_after(6)
    rates = ClusterRates(before, after, 2.0)
    (link,) = rates.links()
    assert (link.bytes_per_s, link.dispatches_per_s, link.tokens_per_s) == (1_000_000, 5, 1_234)
    engine = rates.engine(after.tier(Role.ATTN)[0])
    assert engine is not None
    assert engine.tokens_per_s == 30
    assert engine.step_s is not None
    assert abs(engine.step_s - 0.02) < 1e-9


def test_a_process_that_was_replaced_has_no_rate_yet() -> None:
    before, after = state_after(4), state_after(1, attn_epoch=3)
    rates = ClusterRates(before, after, 1.0)
    assert rates.links() == []
    assert rates.engine(after.tier(Role.ATTN)[0]) is None
    assert "–" in shown(after, rates)


def test_a_frame_shows_load_rates_and_what_is_missing() -> None:
    before, after = state_after(4), state_after(6)
    text = shown(after, ClusterRates(before, after, 2.0))
    assert "not ready: expert 0: not joined" in text
    assert "25% of 128" in text
    assert "1.0 MB/s" in text
    assert "1,234" in text
    assert "20.0 ms" in text
    assert "no tokens yet" in text


def test_a_frame_names_the_hottest_experts_of_each_layer() -> None:
    before = after = state_after(1)
    rows = ((1, 1, 1, 9, 1, 1, 1, 1), (2,) * 8)
    after = replace(after, expert_load=ExpertLoad(MODEL.moe_layer_ids, rows))
    lines = shown(after, ClusterRates(before, after, 1.0)).splitlines()
    (row,) = [line for line in lines if "×4.5" in line]
    assert [cell.strip() for cell in row.split("│")[1:3]] == ["1", "3 ×4.5"]


def test_a_large_cluster_is_counted_instead_of_listed() -> None:
    state = state_after(1, size=4)
    many = tuple(
        replace(state.members[1], rank=rank, dp_rank=rank, instance_epoch=20 + rank)
        for rank in range(20)
    )
    large = replace(state, members=(*state.members, *many))
    text = shown(large, ClusterRates(large, large, 1.0))
    assert "attn: 21 ready of 4" in text
    assert "and 9 more" in text
