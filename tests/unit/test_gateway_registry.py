"""The registry without any stream: versions, refusals and successors."""

import asyncio
import os
import subprocess
import sys

import pytest

from gateway.cluster import Registry
from gateway.leases import CHECK_S, LeaseClock
from gateway.registrations import ADOPTED_S, LEASE_LOST_S, NO_LEASE, STALLED, MemberKey
from moe_core.cluster import (
    AttentionLoad,
    ExpertLoad,
    Join,
    LinkStats,
    MemberState,
    Role,
    StatusReport,
    TierSizes,
)
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import NotFoundError, RequestError
from support.small_gateway import FINGERPRINT, make_registry

PARALLEL = ParallelConfig(attn_devices=2, dp_size=2, expert_devices=2)


class Clock:
    """Time that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def join(
    role: Role = Role.ATTN, rank: int | None = None, epoch: int = 1, pid: int | None = None
) -> Join:
    pid = os.getpid() if pid is None else pid
    return Join(role, "h:1", "cpu", pid, FINGERPRINT, epoch, "float32", "here", rank)


def pass_time(clock: Clock, registry: Registry, key: MemberKey, seconds: float) -> None:
    """As the gateway lives it: it looks at the leases all the time."""
    for _ in range(round(seconds / CHECK_S)):
        clock.now += CHECK_S
        registry.check_lease(key)


def only(registry: Registry, role: Role = Role.ATTN) -> tuple[MemberState, str]:
    (member,) = registry.state.tier(role)
    return member.state, member.detail


def test_versions_grow_with_what_others_act_upon_only() -> None:
    registry = make_registry(PARALLEL)
    key = registry.join(join())
    load = AttentionLoad(0, 0, 8, 8, 4, 8)
    registry.report(key, StatusReport(MemberState.READY, attention_load=load))
    version = registry.state.version
    link = LinkStats("attn 0", "expert 0", "grpc", 1, 1, 1, 1, 1, 1)
    later = AttentionLoad(1, 0, 7, 8, 4, 8)
    registry.report(key, StatusReport(MemberState.READY, attention_load=later, links=(link,)))
    assert registry.state.version == version
    (member,) = registry.state.tier(Role.ATTN)
    assert member.attention_load == later
    assert member.links == (link,)
    registry.report(key, StatusReport(MemberState.DRAINING))
    assert registry.state.version > version


def test_a_state_is_the_same_object_until_something_in_it_changes() -> None:
    registry = make_registry(PARALLEL)
    key = registry.join(join())
    first = registry.state
    assert registry.state is first
    for change in (
        lambda: registry.report(key, StatusReport(MemberState.READY)),
        lambda: registry.lease(key, 10_000),
        lambda: registry.set_sizes(PARALLEL, TierSizes(2, 4)),
        lambda: setattr(registry, "queued_requests", 3),
        lambda: registry.leave(key),
    ):
        before = registry.state
        change()
        assert registry.state is not before
        assert registry.state != before
        assert registry.state is registry.state
    assert first.tier(Role.ATTN)  # what was given out stays as it was


def test_expert_load_stays_while_other_reports_come() -> None:
    registry = make_registry(PARALLEL)
    key = registry.join(join())
    version = registry.state.version
    load = ExpertLoad((1, 2), ((0, 1, 2, 3, 4, 5, 6, 7), (8,) * 8))
    registry.report_expert_load(key, load)
    assert registry.state.version == version
    registry.report(key, StatusReport(MemberState.READY))
    (member,) = registry.state.tier(Role.ATTN)
    assert member.expert_load == load


@pytest.mark.parametrize(
    "load",
    [
        ExpertLoad((), ()),
        ExpertLoad((0, 1), ((0,) * 8,) * 2),
        ExpertLoad((1, 2), ((0,) * 8, (0,) * 7)),
    ],
)
def test_expert_load_of_another_shape_is_refused(load: ExpertLoad) -> None:
    registry = make_registry(PARALLEL)
    key = registry.join(join())
    with pytest.raises(
        RequestError, match=r"attn 0 reports .* 8 experts in each of its MoE layers 1, 2"
    ):
        registry.report_expert_load(key, load)


def test_late_leave_of_a_predecessor_does_not_remove_its_successor() -> None:
    registry = make_registry(PARALLEL)
    old = registry.join(join(epoch=1))
    registry.leave(old)
    registry.join(join(epoch=2))
    registry.leave(old)
    assert [member.instance_epoch for member in registry.state.tier(Role.ATTN)] == [2]
    with pytest.raises(NotFoundError, match="instance_epoch 1"):
        registry.report(old, StatusReport(MemberState.READY))


def test_gateway_cannot_join_a_gateway() -> None:
    with pytest.raises(RequestError, match="role=gateway"):
        make_registry().join(join(Role.GATEWAY))


def test_missing_names_every_rank_that_is_not_ready() -> None:
    registry = make_registry(PARALLEL)
    registry.report(registry.join(join(rank=1)), StatusReport(MemberState.LOADING, "layer 3 of 9"))
    assert registry.state.missing(Role.ATTN) == (
        "attn 0: not joined",
        "attn 1: loading (layer 3 of 9)",
    )


async def test_waiting_for_a_newer_state_ends_with_the_next_change() -> None:
    registry = make_registry(PARALLEL)
    waiting = asyncio.create_task(registry.versions.newer_than(registry.state.version))
    await asyncio.sleep(0)
    assert not waiting.done()
    registry.join(join())
    async with asyncio.timeout(1):
        state = await waiting
    assert len(state.tier(Role.ATTN)) == 1


def test_a_member_whose_leases_do_not_come_has_failed_within_three_seconds() -> None:
    clock = Clock()
    registry = make_registry(PARALLEL, clock)
    key = registry.join(join())
    registry.report(key, StatusReport(MemberState.READY))
    pass_time(clock, registry, key, 2.0)
    registry.lease(key, 0)
    pass_time(clock, registry, key, LEASE_LOST_S - CHECK_S)
    assert only(registry) == (MemberState.READY, "")
    version = registry.state.version
    pass_time(clock, registry, key, CHECK_S)
    assert only(registry) == (MemberState.FAILED, NO_LEASE)
    assert registry.state.version > version
    assert "attn 0: failed (no lease for 3 s)" in registry.state.missing(Role.ATTN)


def test_a_busy_loop_is_not_death() -> None:
    clock = Clock()
    registry = make_registry(PARALLEL, clock)
    key = registry.join(join())
    registry.report(key, StatusReport(MemberState.READY))
    for _ in range(20):
        pass_time(clock, registry, key, 1.0)
        registry.lease(key, 60_000)
    assert only(registry) == (MemberState.READY, STALLED)


def test_a_gateway_that_was_itself_stopped_takes_nobody_for_dead() -> None:
    clock = Clock()
    lease = LeaseClock(clock)
    clock.now += CHECK_S
    assert lease.silent_s() == CHECK_S
    clock.now += 60
    assert lease.silent_s() == 2 * CHECK_S
    clock.now += CHECK_S
    assert lease.silent_s() == 3 * CHECK_S


@pytest.mark.parametrize("word", ["lease", "report"])
def test_the_first_word_of_a_failed_member_is_refused_and_frees_its_rank(word: str) -> None:
    clock = Clock()
    registry = make_registry(PARALLEL, clock)
    key = registry.join(join())
    pass_time(clock, registry, key, LEASE_LOST_S)
    says = {
        "lease": lambda: registry.lease(key, 0),
        "report": lambda: registry.report(key, StatusReport(MemberState.READY)),
    }
    with pytest.raises(NotFoundError, match="attn 0 counts as lost, no lease for 3 s: join again"):
        says[word]()
    assert registry.state.tier(Role.ATTN) == ()
    with pytest.raises(NotFoundError, match="is not joined"):
        registry.require(key)
    again = registry.join(join(rank=0))
    registry.report(again, StatusReport(MemberState.READY))
    assert only(registry) == (MemberState.READY, "")


def test_a_successor_takes_the_rank_of_a_failed_member_and_the_zombie_is_refused() -> None:
    clock = Clock()
    registry = make_registry(PARALLEL, clock)
    old = registry.join(join(rank=0))
    pass_time(clock, registry, old, LEASE_LOST_S)
    new = registry.join(join(rank=0, epoch=2))
    registry.require(new)
    for refused in (lambda: registry.require(old), lambda: registry.lease(old, 0)):
        with pytest.raises(NotFoundError, match="instance_epoch 1 is not joined"):
            refused()
    with pytest.raises(RequestError, match="rank=0: taken by pid"):
        registry.join(join(rank=0))
    registry.leave(old)
    assert only(registry) == (MemberState.LOADING, "")


def test_a_process_that_has_exited_does_not_keep_its_rank() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    registry = make_registry(PARALLEL)
    registry.join(join(rank=0, pid=process.pid))
    registry.join(join(rank=0, epoch=2))
    with pytest.raises(RequestError, match="rank=0: taken by pid"):
        registry.join(join(rank=0, epoch=3))


def test_the_same_process_may_join_again_before_its_old_stream_has_ended() -> None:
    registry = make_registry(PARALLEL)
    old = registry.join(join(rank=1))
    new = registry.join(join(rank=1))
    with pytest.raises(NotFoundError):
        registry.require(old)
    registry.leave(old)
    registry.report(new, StatusReport(MemberState.READY))
    assert only(registry)[0] is MemberState.READY


def test_ranks_up_to_the_target_may_join_while_a_tier_grows() -> None:
    registry = make_registry(PARALLEL)
    with pytest.raises(RequestError, match="rank=3: must be below 2"):
        registry.join(join(Role.EXPERT, rank=3))
    registry.set_sizes(registry.parallel, TierSizes(attn_devices=2, expert_devices=4))
    registry.join(join(Role.EXPERT, rank=3))
    assert registry.state.tier(Role.EXPERT)[0].ep_rank == 1
    assert registry.state.target == TierSizes(2, 4)


async def test_states_are_told_until_the_registry_closes() -> None:
    registry = make_registry(PARALLEL)
    seen = []

    async def follow() -> None:
        async for state in registry.versions.states():
            seen.append(len(state.tier(Role.ATTN)))

    following = asyncio.create_task(follow())
    await asyncio.sleep(0)
    registry.join(join())
    await asyncio.sleep(0)
    registry.versions.close()
    async with asyncio.timeout(1):
        await following
    assert seen == [0, 1]


def test_members_that_a_new_leader_was_told_of_have_time_to_register_with_it() -> None:
    leader, clock = make_registry(PARALLEL), Clock()
    for rank in (0, 1):
        key = leader.join(join(rank=rank, epoch=rank + 1))
        leader.report(key, StatusReport(MemberState.READY))
    registry = make_registry(PARALLEL, clock)
    registry.follow(leader.state, news=True)
    registry.lead(None)
    assert registry.adopted == ["attn 0", "attn 1"]
    key = registry.join(join(rank=0, epoch=1))
    assert [m.state for m in registry.state.tier(Role.ATTN)] == [MemberState.READY] * 2
    for _ in range(round(ADOPTED_S / CHECK_S)):
        registry.lease(key, 0)
        clock.now += CHECK_S
        registry.check_adopted()
    assert [m.rank for m in registry.state.tier(Role.ATTN)] == [0]
    assert registry.adopted == []


def test_lease_of_a_member_that_registered_elsewhere_is_refused() -> None:
    registry = make_registry(PARALLEL)
    key = registry.join(join())
    registry.stop_leading()
    with pytest.raises(NotFoundError, match="not joined"):
        registry.lease(key, 0)
    registry.leave(key)
    assert [m.rank for m in registry.state.tier(Role.ATTN)] == [0]
