"""Moves and copies experts so that the processes of the expert tier are loaded alike.

Knows how many tokens each expert was given since the last look, and which layers gain enough by
another placement. Knows no process: how a placement comes to be used is the leader's business.

Layer by layer, each in a placement epoch of its own, the one that gains most first: so a process
holds what it gives up and what it gets at once for one layer only, and a change that fails leaves
the others done.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from gateway.cluster import Registry
from gateway.expert_totals import ExpertTotals
from gateway.placement_leader import PlacementLeader
from moe_core.cluster import ClusterState, ExpertLoad, LayerLoad, Role
from moe_core.eplb import Held, balanced, imbalance, least_moved, num_moved
from moe_core.errors import ConfigError, UnavailableError
from moe_core.placement import LayerPlacement

log = structlog.get_logger(__name__)

# Below it, moving weights costs more than is won: of the most loaded EP group over the mean.
MIN_GAIN = 0.05
LAYER_TIMEOUT_S = 120.0
NOTHING_SEEN = "no token has been routed since the last look"


@dataclass(frozen=True, slots=True)
class LayerChange:
    """load_before, load_after: of the most loaded EP group over the mean."""

    layer_id: int
    held: Held
    num_moved: int
    load_before: float
    load_after: float


@dataclass(frozen=True, slots=True)
class Rebalanced:
    """What was, or would be, changed. Loads are means over all MoE layers. `reason` says why
    nothing was, and is empty where something was. `layers` are those that change, the one that
    gains most first."""

    layers_changed: int
    experts_moved: int
    load_before: float
    load_after: float
    placement_epoch: int
    reason: str = ""
    layers: tuple[LayerLoad, ...] = ()


def check_rebalance_interval(seconds: float) -> None:
    """Raises ConfigError."""
    if not (math.isfinite(seconds) and seconds >= 0):
        rule = "must be 0 (only when asked) or a number of seconds above it"
        raise ConfigError("rebalance_interval", seconds, rule, (0, 60))


class Rebalancer:
    """num_expert_groups: the router's groups of neighbouring experts; 1 where it has none."""

    def __init__(
        self, registry: Registry, leader: PlacementLeader, num_expert_groups: int = 1
    ) -> None:
        self._registry = registry
        self._leader = leader
        self._num_expert_groups = num_expert_groups
        self._totals = ExpertTotals()
        self._seen: tuple[tuple[int, ...], ExpertLoad] | None = None

    async def run(self, interval_s: float) -> None:
        """Look every `interval_s` seconds, where this gateway leads, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            if not self._leader.leads:
                continue
            try:
                done = await self.rebalance()
            except UnavailableError as error:
                log.warning("experts were not rebalanced", reason=str(error))
                continue
            if not done.reason:
                log.info("experts rebalanced", layers=done.layers_changed, load=done.load_after)

    async def rebalance(self, *, force: bool = False, dry_run: bool = False) -> Rebalanced:
        """Change what gains enough (with `force`: anything), or only say what would be. Raises
        UnavailableError when a layer's change fails; those before it stay changed."""
        with self._leader.turn("rebalancing"):
            load = self._load_since_last_look(keep=dry_run)
            state = self._registry.state
            if load is None:
                return Rebalanced(0, 0, 1.0, 1.0, state.placement.epoch, NOTHING_SEEN)
            # Most of a second for the largest models, in which streams must not stand still.
            changes = await asyncio.to_thread(self._changes, state, load)
            wanted = [each for each in changes if _is_worth_it(each, force)]
            if not dry_run:
                for change in wanted:
                    await self._apply(change)
            return _summary(changes, wanted, self._registry.state.placement.epoch)

    def _load_since_last_look(self, *, keep: bool) -> ExpertLoad | None:
        """None where nothing was routed. `keep`: this look does not count."""
        self._totals.update(self._registry.state)
        total, sources = self._totals.load, self._totals.sources
        if total is None:
            return None
        same = self._seen is not None and self._seen[0] == sources
        load = total.since(self._seen[1]) if same and self._seen is not None else total
        if not keep:
            self._seen = sources, total
        return load if any(map(any, load.tokens)) else None

    def _changes(self, state: ClusterState, load: ExpertLoad) -> list[LayerChange]:
        """Of all layers, best gain first."""
        num_nodes = _num_nodes(state)
        ep_size = state.placement.ep_size
        changes = []
        for layer_id, tokens in zip(load.layer_ids, load.tokens, strict=True):
            old = state.placement.layer(layer_id).held(ep_size)
            best = balanced(
                tokens,
                sum(map(len, old)),
                ep_size,
                num_expert_groups=self._num_expert_groups,
                num_nodes=num_nodes,
            )
            new = least_moved(old, best, num_nodes)
            before, after = imbalance(tokens, old), imbalance(tokens, new)
            changes.append(LayerChange(layer_id, new, num_moved(old, new), before, after))
        return sorted(changes, key=lambda each: each.load_after - each.load_before)

    async def _apply(self, change: LayerChange) -> None:
        state = self._registry.state
        layers = [
            LayerPlacement.of(layer.layer_id, change.held)
            if layer.layer_id == change.layer_id
            else layer
            for layer in state.placement.layers
        ]
        await self._leader.change(layers, state.parallel, timeout_s=LAYER_TIMEOUT_S)


def _is_worth_it(change: LayerChange, force: bool) -> bool:
    gain = change.load_before - change.load_after
    return change.num_moved > 0 and (gain >= MIN_GAIN or (force and gain > 0))


def _summary(
    changes: Sequence[LayerChange], wanted: Sequence[LayerChange], epoch: int
) -> Rebalanced:
    taken = {each.layer_id for each in wanted}
    after = [each.load_after if each.layer_id in taken else each.load_before for each in changes]
    before = sum(each.load_before for each in changes) / len(changes)
    reason = (
        f"no layer gains {MIN_GAIN:g} of the mean load, of which the most loaded EP group has "
        f"{before:.2f} in the mean of layers"
    )
    return Rebalanced(
        layers_changed=len(wanted),
        experts_moved=sum(each.num_moved for each in wanted),
        load_before=before,
        load_after=sum(after) / len(changes),
        placement_epoch=epoch,
        reason="" if wanted else reason,
        layers=tuple(
            LayerLoad(each.layer_id, each.num_moved, each.load_before, each.load_after)
            for each in wanted
        ),
    )


def _num_nodes(state: ClusterState) -> int:
    """Machines that the EP groups are on, where each has as many and they are in rank order; else
    1, which balances over all groups alike."""
    etp_size = state.parallel.etp_size
    hosts = [member.host_id for member in state.tier(Role.EXPERT)][::etp_size]
    hosts = hosts[: state.placement.ep_size]
    if not hosts:
        return 1
    per_node = hosts.count(hosts[0])
    nodes = [set(hosts[i : i + per_node]) for i in range(0, len(hosts), per_node)]
    alike = len(hosts) % per_node == 0 and all(len(node) == 1 for node in nodes)
    return len(nodes) if alike and len(set.union(*nodes)) == len(nodes) else 1
