"""Which group a request goes to."""

from dataclasses import replace

import pytest

from gateway.balancer import Balancer
from gateway.groups import (
    Group,
    known_groups,
    leaving_groups,
    none_usable,
    usable_groups,
)
from moe_core.cluster import AttentionLoad, Join, Member, MemberState, Role, StatusReport
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from support.small_gateway import FINGERPRINT, make_registry

LEADER = Member(Role.ATTN, 0, 1, "h:1", "cpu", MemberState.READY, 1, "here", 0, 0)


def group(dp_rank: int, *, free: int = 100, waiting: int = 0, running: int = 0) -> Group:
    return Group(dp_rank, LEADER, AttentionLoad(running, waiting, free, 100, 4, 8))


def test_most_free_blocks_win() -> None:
    groups = [group(0, free=20), group(1, free=60), group(2, free=40)]
    assert Balancer().choose(groups, 8).dp_rank == 1


def test_group_that_can_start_at_once_beats_a_queue() -> None:
    groups = [group(0, free=90, waiting=3), group(1, free=10)]
    assert Balancer().choose(groups, 8).dp_rank == 1


def test_shortest_queue_wins_where_all_must_wait() -> None:
    groups = [group(0, free=0, waiting=3), group(1, free=0, waiting=1)]
    assert Balancer().choose(groups, 8).dp_rank == 1


def test_burst_between_two_reports_is_spread_evenly() -> None:
    balancer, groups = Balancer(), [group(rank) for rank in range(4)]
    chosen = [balancer.choose(groups, 40).dp_rank for _ in range(16)]
    assert [chosen.count(rank) for rank in range(4)] == [4, 4, 4, 4]


def test_burst_beyond_all_blocks_is_spread_evenly() -> None:
    balancer, groups = Balancer(), [group(rank) for rank in range(2)]
    chosen = [balancer.choose(groups, 400).dp_rank for _ in range(8)]
    assert [chosen.count(rank) for rank in range(2)] == [4, 4]


def test_a_request_counts_for_as_many_sequences_as_it_has_choices() -> None:
    balancer, groups = Balancer(), [group(0), group(1)]
    assert balancer.choose(groups, 40, 3).dp_rank == 0
    assert [balancer.choose(groups, 40).dp_rank for _ in range(3)] == [1, 1, 1]
    # And needs the blocks of all of them to start at once.
    assert Balancer().choose([group(0, free=20), group(1, free=40)], 40, 3).dp_rank == 1


def test_new_report_replaces_what_was_counted_since_the_last() -> None:
    balancer = Balancer()
    first = [group(0), group(1)]
    assert balancer.choose(first, 200).dp_rank == 0
    reported = [replace(first[0], load=AttentionLoad(0, 0, 100, 100, 4, 8)), first[1]]
    assert balancer.choose(reported, 200).dp_rank == 0


def test_request_larger_than_every_pool_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match="401 tokens"):
        Balancer().choose([group(0)], 401)


def test_group_is_usable_when_all_its_ranks_are_ready() -> None:
    registry = make_registry(ParallelConfig(attn_devices=4, dp_size=2))
    load = AttentionLoad(0, 0, 8, 8, 4, 8)
    for rank in range(3):
        join = Join(Role.ATTN, "h:1", "cpu", 7, FINGERPRINT, 1, "float32", "here", rank)
        report = StatusReport(MemberState.READY, attention_load=load if rank % 2 == 0 else None)
        registry.report(registry.join(join), report)
    assert [found.dp_rank for found in usable_groups(registry.state)] == [0]


def test_no_usable_group_is_unavailable_naming_the_missing() -> None:
    words = r"attn 0: not joined; expert 0: not joined\. .*still starting.*try again"
    with pytest.raises(UnavailableError, match=words):
        raise none_usable(make_registry().state)


@pytest.mark.parametrize("drains", [False, True])
async def test_a_group_of_which_one_rank_leaves_takes_nothing_and_can_still_be_asked(
    drains: bool,
) -> None:
    registry = make_registry(ParallelConfig(attn_devices=2))
    for rank in range(2):
        load = AttentionLoad(0, 0, 8, 8, 4, 8) if rank == 0 else None
        join = Join(Role.ATTN, "h:1", "cpu", 7, FINGERPRINT, 5 + rank, "float32", "here", rank)
        registry.report(registry.join(join), StatusReport(MemberState.READY, attention_load=load))
    state = registry.state
    changes = {"state": MemberState.DRAINING} if drains else {"leaving": True}
    members = [
        replace(member, **changes) if member.tp_rank == 1 else member for member in state.members
    ]
    leaving = replace(state, members=tuple(members))
    assert (len(usable_groups(state)), leaving_groups(state)) == (1, frozenset())
    assert (len(usable_groups(leaving)), leaving_groups(leaving)) == (0, frozenset({(0, 5)}))
    assert [group.key for group in known_groups(leaving)] == [(0, 5)]
    with pytest.raises(UnavailableError, match="attn 1: draining" if drains else "attn 1: leaving"):
        raise none_usable(leaving)
