"""Scaling: both tiers up and down, in whole groups, and back again when something goes wrong."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

import gateway.scaling as scaling
from gateway.draining import drain
from gateway.groups import usable_groups
from gateway.leadership import SoleGateway
from gateway.placement_leader import PlacementLeader
from gateway.scaling import Scaling
from moe_core.cluster import ClusterState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError, NotFoundError, RequestError, UnavailableError
from support.obedient_cluster import ObedientCluster, obedient
from support.small_gateway import MODEL

PARALLEL = ParallelConfig(attn_devices=1, expert_devices=2, ep_size=2, expert_parallel_degree=2)


async def scale(
    cluster: ObedientCluster, attn: int | None = None, experts: int | None = None
) -> list[str]:
    registry = cluster.registry
    scaled = Scaling(registry, PlacementLeader(registry, SoleGateway()), MODEL).scale(attn, experts)
    async with aclosing(scaled) as phases:
        return [phase async for phase in phases]


def members(state: ClusterState, role: Role) -> list[int]:
    return [member.rank for member in state.tier(role)]


async def test_expert_tier_grows_and_shrinks_with_its_placement() -> None:
    async with obedient(PARALLEL) as cluster:
        for size in (4, 3, 2):
            await scale(cluster, experts=size)
            state = cluster.registry.state
            assert members(state, Role.EXPERT) == list(range(size))
            assert (state.parallel.expert_devices, state.parallel.ep_size) == (size, size)
            assert state.placement.ep_size == size
            assert state.placement.holders == set(range(size))
            assert state.parallel.degree == 2
            assert state.target is None
        assert state.placement.epoch == 3


async def test_level_0_grows_by_whole_groups_and_becomes_level_1() -> None:
    async with obedient(ParallelConfig(expert_devices=2)) as cluster:
        with pytest.raises(ConfigError, match=r"whole groups of 2.*nearest valid: 2, 4"):
            await scale(cluster, experts=3)
        await scale(cluster, experts=4)
        parallel = cluster.registry.parallel
        assert (parallel.ep_size, parallel.etp_size, parallel.degree) == (2, 2, 1)


async def test_attention_tier_grows_and_shrinks_by_groups() -> None:
    async with obedient(PARALLEL) as cluster:
        for size in (3, 1):
            await scale(cluster, attn=size)
            state = cluster.registry.state
            assert members(state, Role.ATTN) == list(range(size))
            assert state.parallel.dp_size == size
            assert len(usable_groups(state)) == size
            assert state.placement.epoch == 0


async def test_both_tiers_in_one_call() -> None:
    async with obedient(PARALLEL) as cluster:
        phases = await scale(cluster, attn=2, experts=3)
        assert phases[0] == "waiting for expert 2 to come"
        assert "loading experts on expert 2" in phases
        assert phases[-1] == "waiting for attn 1 to come"
        state = cluster.registry.state
        assert (state.parallel.attn_devices, state.parallel.expert_devices) == (2, 3)


async def test_scaling_to_the_size_in_force_brings_back_who_was_drained() -> None:
    async with obedient(replace(PARALLEL, attn_devices=2, dp_size=2)) as cluster:
        registry = cluster.registry
        assert await scale(cluster, attn=2) == []
        drain(registry, Role.ATTN, 0)
        phases = await scale(cluster, attn=2)
        assert phases == ["waiting for attn 0 to leave", "waiting for attn 0 to come"]
        assert members(registry.state, Role.ATTN) == [0, 1]
        assert (registry.state.target, registry.parallel.attn_devices) == (None, 2)


async def test_a_tier_that_is_not_asked_for_stays_without_who_was_drained() -> None:
    async with obedient(replace(PARALLEL, attn_devices=2, dp_size=2)) as cluster:
        cluster.starts = False
        cluster.kill(Role.ATTN, 0)
        assert await scale(cluster, experts=2) == []
        assert members(cluster.registry.state, Role.ATTN) == [1]


async def test_many_ranks_are_named_by_the_first_and_the_last() -> None:
    async with obedient(PARALLEL) as cluster:
        assert await scale(cluster, attn=99) == ["waiting for attn 1 to 98 to come"]


async def test_processes_that_never_come_leave_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaling, "ARRIVAL_TIMEOUT_S", 0.05)
    async with obedient(PARALLEL) as cluster:
        cluster.starts = False
        before = cluster.registry.state
        with pytest.raises(UnavailableError, match="expert 2 is not ready; expert 3 is not ready"):
            await scale(cluster, experts=4)
        state = cluster.registry.state
        assert (state.parallel, state.target) == (before.parallel, None)
        assert state.placement == before.placement


async def test_growth_that_fails_sends_away_who_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "ARRIVAL_TIMEOUT_S", 0.05)
    async with obedient(PARALLEL) as cluster:
        cluster.stubborn.add(3)
        with pytest.raises(UnavailableError, match="expert 3 is not prepared"):
            await scale(cluster, experts=4)
        async with asyncio.timeout(5):
            while members(cluster.registry.state, Role.EXPERT) != [0, 1]:
                await asyncio.sleep(0)
        state = cluster.registry.state
        assert (state.placement.epoch, state.next_placement, state.target) == (0, None, None)


async def test_caller_that_goes_away_takes_the_change_back() -> None:
    async with obedient(PARALLEL) as cluster:
        cluster.starts = False
        scaled = Scaling(
            cluster.registry, PlacementLeader(cluster.registry, SoleGateway()), MODEL
        ).scale(None, 4)
        async with aclosing(scaled) as phases:
            await anext(phases)
            assert cluster.registry.state.target is not None
        assert cluster.registry.state.target is None


@pytest.mark.parametrize(
    ("attn", "experts", "words"),
    [(None, 0, "expert_devices=0"), (0, None, "attn_devices=0"), (None, 9, "expert_devices=9")],
)
async def test_sizes_that_cannot_be_are_refused(
    attn: int | None, experts: int | None, words: str
) -> None:
    async with obedient(PARALLEL) as cluster:
        with pytest.raises(ConfigError, match=words):
            await scale(cluster, attn, experts)
        assert cluster.registry.state.target is None


async def test_colocated_tiers_stay_as_they_are() -> None:
    async with obedient(ParallelConfig(attn_devices=2, expert_devices=2, colocated=True)) as both:
        with pytest.raises(ConfigError, match="colocated"):
            await scale(both, experts=4)


async def test_drained_group_leaves_whole_and_the_last_one_is_kept() -> None:
    parallel = ParallelConfig(attn_devices=4, dp_size=2, expert_devices=2, ep_size=2)
    async with obedient(parallel) as cluster:
        registry = cluster.registry
        drain(registry, Role.ATTN, 3)
        assert [m.rank for m in registry.state.members if m.leaving] == [2, 3]
        with pytest.raises(UnavailableError, match="no other attention group"):
            drain(registry, Role.ATTN, 0)
        with pytest.raises(UnavailableError, match="expert 1 holds experts that no other"):
            drain(registry, Role.EXPERT, 1)
        with pytest.raises(NotFoundError, match="expert 7"):
            drain(registry, Role.EXPERT, 7)
        with pytest.raises(RequestError, match="SIGTERM"):
            drain(registry, Role.GATEWAY, 0)


async def test_expert_process_with_copies_elsewhere_may_leave() -> None:
    parallel = ParallelConfig(expert_devices=2, ep_size=2, num_redundant_experts=8)
    async with obedient(parallel) as cluster:
        drain(cluster.registry, Role.EXPERT, 1)
        async with asyncio.timeout(5):
            while members(cluster.registry.state, Role.EXPERT) != [0]:
                await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="expert 0 holds experts"):
            drain(cluster.registry, Role.EXPERT, 0)
