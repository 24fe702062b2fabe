"""The leader's protocol: prepared before used, adopted before the next, taken back as a whole."""

import asyncio

import pytest

import gateway.placement_leader as leader_module
from gateway.leadership import SoleGateway
from gateway.placement_leader import PlacementLeader
from moe_core.cluster import MemberState, Role, StatusReport
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from moe_core.placement import LayerPlacement
from support.obedient_cluster import ObedientCluster, obedient

PARALLEL = ParallelConfig(attn_devices=2, dp_size=2, expert_devices=2, ep_size=2)
TIMEOUT_S = 5.0


def swapped(cluster: ObedientCluster) -> list[LayerPlacement]:
    """The first layer with its two groups' experts exchanged."""
    placement = cluster.registry.state.placement
    first, *rest = placement.layers
    return [LayerPlacement.of(first.layer_id, first.held(placement.ep_size)[::-1]), *rest]


async def change(
    cluster: ObedientCluster, leader: PlacementLeader, timeout_s: float = TIMEOUT_S
) -> int:
    registry = cluster.registry
    with leader.turn("a test"):
        wanted = await leader.change(swapped(cluster), registry.parallel, timeout_s=timeout_s)
    return wanted.epoch


async def test_placement_is_used_only_after_all_have_prepared() -> None:
    async with obedient(PARALLEL) as cluster:
        cluster.stubborn.add(1)
        leader = PlacementLeader(cluster.registry, SoleGateway())
        changing = asyncio.create_task(change(cluster, leader))
        while cluster.registry.state.next_placement is None:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
            assert cluster.registry.state.placement.epoch == 0
        cluster.stubborn.clear()
        cluster.registry.set_address("h:2")  # the others look again
        assert await changing == 1
        state = cluster.registry.state
        assert (state.placement.epoch, state.next_placement) == (1, None)
        assert (0, 1) in cluster.history


async def test_change_ends_when_nobody_uses_the_old_one() -> None:
    async with obedient(PARALLEL) as cluster:
        cluster.deaf.add(1)
        changing = asyncio.create_task(
            change(cluster, PlacementLeader(cluster.registry, SoleGateway()))
        )
        while cluster.registry.state.placement.epoch == 0:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not changing.done()
        cluster.deaf.clear()
        cluster.registry.set_address("h:2")
        assert await changing == 1


async def test_old_placement_that_is_used_for_too_long_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader_module, "ADOPT_TIMEOUT_S", 0.05)
    async with obedient(PARALLEL) as cluster:
        cluster.deaf.add(1)
        with pytest.raises(UnavailableError, match="attn 1 may still use placement epoch 0"):
            await change(cluster, PlacementLeader(cluster.registry, SoleGateway()))
        assert cluster.registry.state.placement.epoch == 1


async def test_unprepared_process_takes_the_change_back_and_its_epoch_is_not_used_again() -> None:
    async with obedient(PARALLEL) as cluster:
        cluster.stubborn.add(1)
        leader = PlacementLeader(cluster.registry, SoleGateway())
        with pytest.raises(UnavailableError, match=r"0\.05 s: expert 1 is not prepared"):
            await change(cluster, leader, timeout_s=0.05)
        state = cluster.registry.state
        assert (state.placement.epoch, state.next_placement) == (0, None)
        cluster.stubborn.clear()
        assert await change(cluster, leader) == 2


async def test_process_that_cannot_prepare_takes_the_change_back_at_once_and_says_why() -> None:
    async with obedient(PARALLEL) as cluster:
        cluster.stubborn.add(1)
        changing = asyncio.create_task(
            change(cluster, PlacementLeader(cluster.registry, SoleGateway()))
        )
        while (wanted := cluster.registry.state.next_placement) is None:
            await asyncio.sleep(0)
        earlier, now = (
            StatusReport(MemberState.READY, "the disk is gone", refused_epoch=epoch)
            for epoch in (wanted.epoch - 1, wanted.epoch)
        )
        cluster.registry.report(cluster.keys[Role.EXPERT, 1], earlier)
        await asyncio.sleep(0.01)
        assert not changing.done()
        cluster.registry.report(cluster.keys[Role.EXPERT, 1], now)
        with pytest.raises(UnavailableError, match="expert 1 refuses: the disk is gone"):
            await changing
        assert cluster.registry.state.next_placement is None


async def test_loss_of_a_holder_takes_the_change_back_at_once() -> None:
    async with obedient(PARALLEL) as cluster:
        cluster.stubborn.add(1)
        changing = asyncio.create_task(
            change(cluster, PlacementLeader(cluster.registry, SoleGateway()))
        )
        while cluster.registry.state.next_placement is None:
            await asyncio.sleep(0)
        cluster.kill(Role.EXPERT, 1)
        with pytest.raises(UnavailableError, match="expert 1 was lost"):
            await changing
        assert cluster.registry.state.next_placement is None


async def test_successor_of_a_holder_does_not_pass_for_it() -> None:
    async with obedient(PARALLEL) as cluster:
        cluster.stubborn.add(1)
        changing = asyncio.create_task(
            change(cluster, PlacementLeader(cluster.registry, SoleGateway()))
        )
        while cluster.registry.state.next_placement is None:
            await asyncio.sleep(0)
        cluster.kill(Role.EXPERT, 1)
        cluster.add(Role.EXPERT, 1)
        with pytest.raises(UnavailableError, match="expert 1 was lost"):
            await changing


async def test_second_change_is_refused_naming_the_first() -> None:
    async with obedient(PARALLEL) as cluster:
        leader = PlacementLeader(cluster.registry, SoleGateway())
        with (
            leader.turn("the first"),
            pytest.raises(UnavailableError, match="the second has to wait: the first is under way"),
            leader.turn("the second"),
        ):
            pass
        with leader.turn("the second"):
            pass


async def test_epochs_of_an_earlier_gateway_are_not_given_out_again() -> None:
    async with obedient(PARALLEL) as cluster:
        leader = PlacementLeader(cluster.registry, SoleGateway())
        assert await change(cluster, leader) == 1
        assert await change(cluster, PlacementLeader(cluster.registry, SoleGateway())) == 2
