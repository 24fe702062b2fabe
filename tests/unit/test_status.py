"""What status shows: the members' table on a narrow terminal, who is missing, and the JSON."""

import io
from dataclasses import replace

from rich.console import Console

from epserve.status import details, members_table, status_document
from moe_core.cluster import ClusterState, Member, MemberState, Role, TierSizes
from moe_core.config.parallel import ParallelConfig
from moe_core.placement import ExpertPlacement

DETAIL = "expert 0: NIXL says [/] NIXL_ERR_REMOTE_DISCONNECT"
ATTN = Member(
    *(Role.ATTN, 0, 4194303, "192.168.100.100:50051", "cuda:0", MemberState.CONNECTING, 1, "here"),
    dp_rank=0,
    tp_rank=0,
    detail=DETAIL,
)
EXPERT = replace(
    ATTN,
    role=Role.EXPERT,
    dp_rank=None,
    tp_rank=None,
    ep_rank=0,
    etp_rank=0,
    experts=256,
    detail="",
)


def state_of(*members: Member, target: TierSizes | None = None) -> ClusterState:
    parallel = ParallelConfig(attn_devices=2, dp_size=2)
    return ClusterState(1, parallel, members, ExpertPlacement(0, 1, 1, ()), target=target)


def shown(state: ClusterState) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=80)
    console.print(members_table(state))
    for line in details(state):
        console.print(line, soft_wrap=True)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_nothing_in_the_table_is_broken_at_80_columns():
    lines = shown(state_of(ATTN, EXPERT))
    words = ["attn 0", "dp 0 tp 0", "cuda:0", "192.168.100.100:50051", "4194303", "connecting"]
    assert [w for w in words if w in lines[2]] == words
    assert "expert 0  ep 0 tp 0      256  cuda:0" in lines[4]
    assert len(lines) == 6


def test_a_detail_stands_below_the_table_complete_and_never_read_as_markup():
    assert shown(state_of(ATTN, EXPERT))[-1] == f"attn 0 connecting: {DETAIL}"


def test_ranks_that_no_process_has_are_shown_in_their_tier():
    lines = shown(state_of(ATTN, EXPERT))
    assert lines[3].split() == ["attn", "1", "not", "joined"]


def test_ranks_that_the_tiers_are_to_get_are_shown_and_many_are_counted():
    lines = shown(state_of(ATTN, EXPERT, target=TierSizes(99, 1)))
    assert [line.split()[:2] for line in lines[3:11]] == [["attn", str(n)] for n in range(1, 9)]
    assert lines[11].split() == ["+90", "more", "not", "joined"]
    assert not any("not joined" in line for line in shown(state_of(ATTN, target=TierSizes(1, 0))))


def test_the_json_always_has_the_sizes_and_the_target():
    told = status_document(state_of(ATTN))
    assert told["sizes"] == {"attn_devices": 2, "expert_devices": 1}
    assert told["target"] is None
    told = status_document(state_of(ATTN, target=TierSizes(4, 1)))
    assert told["target"] == {"attn_devices": 4, "expert_devices": 1}
