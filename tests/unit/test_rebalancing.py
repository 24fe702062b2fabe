"""Rebalancing: what gains enough is moved, layer by layer, and the rest is left alone."""

import asyncio
import time
from typing import Any

import pytest

import gateway.rebalancing as rebalancing
from gateway.leadership import SoleGateway
from gateway.placement_leader import PlacementLeader
from gateway.rebalancing import NOTHING_SEEN, Rebalancer, check_rebalance_interval
from moe_core.cluster import ExpertLoad, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.eplb import Held, imbalance
from moe_core.errors import ConfigError, UnavailableError
from support.obedient_cluster import ObedientCluster, obedient

PARALLEL = ParallelConfig(
    attn_devices=2, dp_size=2, expert_devices=4, ep_size=4, num_redundant_experts=4
)
HOT = (1000, 10, 10, 10, 900, 10, 10, 10)
EVEN = (100,) * 8


def loads(cluster: ObedientCluster, *rows: tuple[int, ...]) -> ExpertLoad:
    """Of the first layers; the rest have no tokens at all."""
    layer_ids = tuple(layer.layer_id for layer in cluster.registry.state.placement.layers)
    idle = ((0,) * 8,) * (len(layer_ids) - len(rows))
    return ExpertLoad(layer_ids, (*rows, *idle))


def rebalancer(cluster: ObedientCluster) -> Rebalancer:
    return Rebalancer(cluster.registry, PlacementLeader(cluster.registry, SoleGateway()))


async def test_hot_layer_is_levelled_and_the_even_one_stays() -> None:
    async with obedient(PARALLEL) as cluster:
        before = cluster.registry.state.placement
        cluster.route(0, loads(cluster, HOT, EVEN))
        done = await rebalancer(cluster).rebalance()
        after = cluster.registry.state.placement
        assert (done.layers_changed, done.reason, done.placement_epoch) == (1, "", after.epoch)
        hot, even = after.layers[:2]
        assert even == before.layers[1]
        assert imbalance(HOT, hot.held(4)) < imbalance(HOT, before.layers[0].held(4))
        assert done.load_after < done.load_before


async def test_every_layer_is_an_epoch_of_its_own_and_the_worst_comes_first() -> None:
    async with obedient(PARALLEL) as cluster:
        warm = (500, 10, 10, 10, 400, 100, 100, 100)
        cluster.route(0, loads(cluster, warm, HOT))
        first, second = cluster.registry.state.placement.layers[:2]
        done = await rebalancer(cluster).rebalance()
        assert (done.layers_changed, done.placement_epoch) == (2, 2)
        epochs = [pair for pair in cluster.history if pair[1]]
        assert epochs.index((0, 1)) < epochs.index((1, 2))
        state = cluster.registry.state
        assert state.placement.layers[0] != first
        assert state.placement.layers[1] != second


async def test_only_what_came_since_the_last_look_counts() -> None:
    async with obedient(PARALLEL) as cluster:
        balancing = rebalancer(cluster)
        cluster.route(0, loads(cluster, HOT))
        assert (await balancing.rebalance()).layers_changed == 1
        assert (await balancing.rebalance()).reason == NOTHING_SEEN
        cluster.route(0, loads(cluster, tuple(2 * count for count in HOT)))
        assert "no layer gains" in (await balancing.rebalance()).reason


async def test_dry_run_changes_nothing_and_is_no_look() -> None:
    async with obedient(PARALLEL) as cluster:
        balancing = rebalancer(cluster)
        cluster.route(0, loads(cluster, HOT))
        would = await balancing.rebalance(dry_run=True)
        assert (would.layers_changed, would.placement_epoch) == (1, 0)
        (layer,) = would.layers
        before = cluster.registry.state.placement.layers[0]
        assert (layer.layer_id, layer.experts_moved) == (before.layer_id, would.experts_moved)
        assert layer.load_before == imbalance(HOT, before.held(4)) > layer.load_after
        assert cluster.registry.state.placement.epoch == 0
        assert (await balancing.rebalance()).experts_moved == would.experts_moved


async def test_force_takes_what_gains_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalancing, "MIN_GAIN", 10.0)
    async with obedient(PARALLEL) as cluster:
        cluster.route(0, loads(cluster, HOT))
        balancing = rebalancer(cluster)
        assert (await balancing.rebalance(dry_run=True)).layers_changed == 0
        assert (await balancing.rebalance(force=True)).layers_changed == 1


async def test_failure_keeps_the_layers_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalancing, "LAYER_TIMEOUT_S", 0.05)
    async with obedient(PARALLEL) as cluster:
        cluster.stubborn.add(2)
        cluster.route(0, loads(cluster, HOT))
        with pytest.raises(UnavailableError, match="expert 2 is not prepared"):
            await rebalancer(cluster).rebalance()
        state = cluster.registry.state
        assert (state.placement.epoch, state.next_placement) == (0, None)


async def test_it_goes_on_by_itself_also_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalancing, "LAYER_TIMEOUT_S", 0.02)
    async with obedient(PARALLEL) as cluster:
        cluster.stubborn.add(2)
        cluster.route(0, loads(cluster, HOT))
        running = asyncio.create_task(rebalancer(cluster).run(0.01))
        await asyncio.sleep(0.1)
        assert not running.done()
        assert cluster.registry.state.placement.epoch == 0
        cluster.stubborn.clear()
        cluster.route(0, loads(cluster, tuple(2 * count for count in HOT)))
        async with asyncio.timeout(5):
            while cluster.registry.state.placement.epoch == 0:
                await asyncio.sleep(0.005)
        running.cancel()
        await asyncio.wait({running})


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_interval_that_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="rebalance_interval"):
        check_rebalance_interval(seconds)


async def test_streams_go_on_while_a_large_model_is_balanced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick = rebalancing.balanced

    def slow(*args: Any, **kwargs: Any) -> Held:  # noqa: ANN401
        time.sleep(0.02)
        return quick(*args, **kwargs)

    monkeypatch.setattr(rebalancing, "balanced", slow)
    async with obedient(PARALLEL) as cluster:
        cluster.route(0, loads(cluster, HOT))
        work = asyncio.create_task(rebalancer(cluster).rebalance(dry_run=True))
        turns = 0
        while not work.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert turns > 5


async def test_tier_without_a_process_is_no_crash() -> None:
    async with obedient(PARALLEL) as cluster:
        cluster.route(0, loads(cluster, HOT))
        for rank in range(4):
            cluster.kill(Role.EXPERT, rank)
        done = await rebalancer(cluster).rebalance(dry_run=True)
        assert done.layers_changed == 1
