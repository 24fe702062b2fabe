"""Whom the nemesis hits, with what, and that it leaves nothing stopped."""

import asyncio
import signal
import time
from dataclasses import replace

import pytest

from epserve.chaos.faults import Fault, Injected
from epserve.chaos.nemesis import (
    Nemesis,
    NemesisSettings,
    choices,
    missing_roles,
    slow_down,
    spared_groups,
)
from epserve.chaos.recovery import Recovery, is_ready_again
from epserve.restarts import RestartLimits
from moe_core.cluster import MemberState, Role
from moe_core.errors import ConfigError
from support.chaos_cluster import FakeCluster, member, whole_cluster

WORKERS = (Role.ATTN, Role.EXPERT)


def settings(
    *faults: Fault, roles: tuple[Role, ...] = WORKERS, seed: int = 0, freeze_s: float = 0.15
) -> NemesisSettings:
    return NemesisSettings(faults or tuple(Fault), roles, seed, pause_s=0.01, freeze_s=freeze_s)


def names(found: list[tuple[Fault, object]]) -> set[str]:
    return {f"{fault} {each.role} {each.rank}" for fault, each in found}


def test_any_ready_member_of_the_roles_may_be_hit():
    found = choices(whole_cluster(), settings(Fault.KILL, Fault.DELAY), ())
    assert names(found) == {
        f"{fault} {role} {rank}"
        for fault in ("kill", "delay")
        for role in WORKERS
        for rank in (0, 1)
    }
    gateway = settings(Fault.KILL, roles=(Role.GATEWAY,))
    assert names(choices(whole_cluster(), gateway, ())) == {"kill gateway 0"}


def test_nobody_is_taken_from_a_tier_that_misses_one():
    cluster = FakeCluster()
    cluster.remove(Role.EXPERT, 1)
    assert cluster.state is not None
    found = names(choices(cluster.state, settings(Fault.KILL, Fault.DELAY), ()))
    assert found == {"kill attn 0", "kill attn 1", "delay attn 0", "delay attn 1", "delay expert 0"}
    hit_just_now = names(choices(whole_cluster(), settings(Fault.FREEZE), {Role.ATTN}))
    assert hit_just_now == {"freeze expert 0", "freeze expert 1"}


def test_nobody_is_taken_away_so_often_that_it_would_not_be_started_again():
    now, limits = time.monotonic(), RestartLimits(deaths=4, within_s=60.0)
    often, seldom = member(Role.EXPERT, 0), member(Role.EXPERT, 1)
    injected = [Injected(Fault.KILL, seldom, now - 70.0, now - 70.0)]
    injected += [Injected(Fault.DELAY, seldom, now - 1.0, now - 1.0) for _ in range(9)]
    injected += [Injected(Fault.KILL, often, now - 50.0, now - 50.0)]
    assert spared_groups(injected, limits) == set()
    injected += [Injected(Fault.FREEZE, often, now - 80.0)]  # which has not thawed
    injected += [Injected(Fault.RESTART, seldom, now - 9.0, now - 9.0)]
    spared = spared_groups(injected, limits)
    assert spared == {(Role.EXPERT, 0)}
    allowed = settings(Fault.KILL, Fault.DELAY, roles=(Role.EXPERT,))
    found = names(choices(whole_cluster(), allowed, (), spared))
    assert found == {"kill expert 1", "delay expert 0", "delay expert 1"}


def test_members_of_one_attention_group_are_spared_together():
    now, limits = time.monotonic(), RestartLimits(deaths=4)
    pair = [replace(member(Role.ATTN, rank), dp_rank=0) for rank in range(2)]
    injected = [Injected(Fault.KILL, each, now, now) for each in pair]
    assert spared_groups(injected, limits) == {(Role.ATTN, 0)}


def test_members_that_are_not_ready_or_leave_are_left_alone():
    cluster = FakeCluster()
    cluster.replace_member(Role.EXPERT, 0, state=MemberState.LOADING)
    cluster.replace_member(Role.ATTN, 1, leaving=True)
    assert cluster.state is not None
    found = names(choices(cluster.state, settings(Fault.DELAY), ()))
    assert found == {"delay attn 0", "delay expert 1"}


async def injected_with(seed: int) -> list[str]:
    cluster = FakeCluster()
    nemesis = Nemesis(cluster, settings(Fault.KILL, seed=seed), open_process=cluster.open_process)
    await nemesis.run(0.2)
    assert cluster.signals == [(i.name, signal.SIGKILL) for i in nemesis.injected]
    return [i.name for i in nemesis.injected]


async def test_victims_follow_from_the_seed_and_are_one_of_each_tier_while_none_comes_back():
    first = await injected_with(1)
    assert await injected_with(1) == first
    assert {name.split()[0] for name in first} == {"attn", "expert"}
    assert len(first) == 2
    assert len({tuple(await injected_with(seed)) for seed in range(8)}) > 1


async def test_what_was_frozen_runs_again_even_when_the_nemesis_is_cancelled():
    cluster = FakeCluster()
    frozen = asyncio.Event()
    nemesis = Nemesis(
        cluster,
        settings(Fault.FREEZE, freeze_s=60.0),
        lambda _: frozen.set(),
        cluster.open_process,
    )
    running = asyncio.create_task(nemesis.run(60.0))
    async with asyncio.timeout(5):
        await frozen.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    name = nemesis.injected[0].name
    assert cluster.signals == [(name, signal.SIGSTOP), (name, signal.SIGCONT)]
    assert nemesis.injected[0].ended_at is not None


async def test_a_slow_process_is_stopped_and_let_go_in_turns():
    cluster = FakeCluster()
    await slow_down(cluster.open_process(member(Role.EXPERT, 0)), 0.05, 0.001, 0.001)
    numbers = [number for _, number in cluster.signals]
    assert numbers[-1] is signal.SIGCONT
    turns = numbers[:-1]
    assert len(turns) >= 4
    assert turns == [signal.SIGSTOP, signal.SIGCONT] * (len(turns) // 2)


async def test_a_gateway_that_does_not_answer_and_a_process_that_has_ended_are_waited_for():
    cluster = FakeCluster()
    cluster.state = None
    nemesis = Nemesis(cluster, settings(), open_process=cluster.open_process)
    await nemesis.run(0.1)
    cluster.state = whole_cluster()
    cluster.gone = {each.pid for each in cluster.state.members}
    await nemesis.run(0.1)
    assert (nemesis.injected, cluster.signals) == ([], [])


def test_a_member_is_back_once_a_new_process_is_ready():
    old = member(Role.EXPERT, 1)
    cluster = FakeCluster()
    killed, frozen = Injected(Fault.KILL, old, 1.0, 1.0), Injected(Fault.FREEZE, old, 1.0)
    assert cluster.state is not None
    assert not is_ready_again(cluster.state, killed)  # nobody has noticed yet
    assert not is_ready_again(cluster.state, frozen)  # still frozen
    frozen.ended_at = 2.0
    assert is_ready_again(cluster.state, frozen)
    cluster.replace_member(Role.EXPERT, 1, instance_epoch=2, state=MemberState.LOADING)
    assert not is_ready_again(cluster.state, killed)
    cluster.replace_member(Role.EXPERT, 1, state=MemberState.READY)
    assert is_ready_again(cluster.state, killed)


async def test_recovery_marks_who_is_back_and_says_who_is_not():
    cluster = FakeCluster()
    injected = [Injected(Fault.KILL, member(Role.EXPERT, 1), 1.0, 1.0)]
    recovery = Recovery(cluster, injected)
    cluster.remove(Role.EXPERT, 1)
    await recovery.until_whole(0.0)
    assert recovery.missing == ("expert 1: not joined",)
    assert missing_roles(injected) == {Role.EXPERT}
    cluster.state = whole_cluster()
    cluster.replace_member(Role.EXPERT, 1, instance_epoch=2)
    await recovery.until_whole(5.0)
    assert (recovery.missing, missing_roles(injected)) == ((), set())
    cluster.state = None
    await recovery.look()
    assert recovery.missing == ("gateway: not listening",)


@pytest.mark.parametrize("pause_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_pause_that_is_no_time_is_refused(pause_s: float):
    with pytest.raises(ConfigError, match="pause="):
        NemesisSettings((Fault.KILL,), WORKERS, 0, pause_s, 1.0)
