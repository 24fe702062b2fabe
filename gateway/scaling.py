"""Changes how many processes a tier has, while it serves.

Knows targets, who has come and who has left, and that the expert tier's size changes with a
placement of its experts. Starts no process: whoever does, follows `ClusterState.target`.

Invariant: a tier's size in force changes only once everything that the new size needs is there;
what goes wrong before that is taken back, and processes that came are asked to leave again.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

import structlog

from gateway.cluster import Registry
from gateway.expert_totals import ExpertTotals
from gateway.placement_leader import PlacementLeader
from moe_core.cluster import ClusterState, MemberState, Role, TierSizes
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.eplb import resized
from moe_core.errors import ConfigError
from moe_core.listing import MOST_NAMED, listed
from moe_core.placement import LayerPlacement

log = structlog.get_logger(__name__)

ARRIVAL_TIMEOUT_S = 1800.0  # of processes that load large weights from slow disks
LEAVE_TIMEOUT_S = 120.0


class Scaling:
    def __init__(self, registry: Registry, leader: PlacementLeader, model: ModelConfig) -> None:
        self._registry = registry
        self._leader = leader
        self._model = model

    async def scale(
        self, attn_devices: int | None, expert_devices: int | None
    ) -> AsyncGenerator[str, None]:
        """Says in words what is waited for, and ends when the tiers have so many processes; None
        leaves a tier as it is. The expert tier changes first. A tier that has the size already is
        to have all its processes again.

        Raises ConfigError for a size that cannot be, UnavailableError when another change is under
        way or this one fails: then the tier that it failed on is as it was.
        """
        old = self._registry.parallel
        if old.colocated:
            rule = "each device hosts a rank of both tiers, so neither can change alone"
            raise ConfigError("colocated", True, rule)
        new = old.resized(self._model, attn_devices=attn_devices, expert_devices=expert_devices)
        what = f"scaling to attn_devices={new.attn_devices}, expert_devices={new.expert_devices}"
        with self._leader.turn(what):
            between = old.resized(self._model, expert_devices=new.expert_devices)
            steps = ((Role.EXPERT, expert_devices, between), (Role.ATTN, attn_devices, new))
            before = old
            for role, asked, after in steps:
                if asked is not None:
                    async with aclosing(self._resize(role, before, after)) as phases:
                        async for phase in phases:
                            yield phase
                before = after

    def _resize(
        self, role: Role, before: ParallelConfig, after: ParallelConfig
    ) -> AsyncGenerator[str, None]:
        if _size(before, role) < _size(after, role):
            return self._grow(role, before, after)
        if _size(before, role) > _size(after, role):
            return self._shrink(role, before, after)
        return self._fill(role, after)

    async def _fill(self, role: Role, parallel: ParallelConfig) -> AsyncGenerator[str, None]:
        """Ask for the ranks again that the tier is to have and that have left, as by a drain."""
        ranks = range(_size(parallel, role))
        if leaving := [m.rank for m in self._registry.state.tier(role) if m.leaving]:
            yield f"waiting for {role} {_ranks(leaving)} to leave"
            await self._until_gone(role, leaving)
        there = {m.rank for m in self._registry.state.tier(role)}
        missing = [rank for rank in ranks if rank not in there]
        if not missing:
            return
        self._registry.set_sizes(parallel, TierSizes.of(parallel))
        try:
            yield f"waiting for {role} {_ranks(missing)} to come"
            await self._until_ready(role, missing)
        finally:
            self._registry.set_sizes(parallel, None)

    async def _grow(
        self, role: Role, before: ParallelConfig, after: ParallelConfig
    ) -> AsyncGenerator[str, None]:
        coming = range(_size(before, role), _size(after, role))
        self._registry.set_sizes(before, TierSizes.of(after))
        try:
            yield f"waiting for {role} {_ranks(coming)} to come"
            await self._until_ready(role, coming)
            if role is Role.EXPERT:
                yield f"loading experts on {role} {_ranks(coming)}"
                await self._place(after)
            await self._leader.set_sizes(after)
        except BaseException:
            if not self._leader.undecided:
                self._registry.set_sizes(before, None)
                self._registry.set_leaving(role, coming)
            raise

    async def _shrink(
        self, role: Role, before: ParallelConfig, after: ParallelConfig
    ) -> AsyncGenerator[str, None]:
        going = range(_size(after, role), _size(before, role))
        if role is Role.EXPERT:
            yield f"loading the experts of {role} {_ranks(going)} elsewhere"
            await self._place(after)
        sizes = self._registry.parallel
        self._registry.set_sizes(sizes, TierSizes.of(after))
        try:
            yield f"waiting for {role} {_ranks(going)} to leave"
            self._registry.set_leaving(role, going)
            await self._until_gone(role, going)
            await self._leader.set_sizes(after)
        except BaseException:  # what was asked to leave may be started again
            self._registry.set_sizes(sizes, None)
            raise

    async def _until_ready(self, role: Role, ranks: Sequence[int]) -> None:
        lagging = partial(_not_ready, role, ranks)
        await self._registry.versions.until_none(lagging, ARRIVAL_TIMEOUT_S)

    async def _until_gone(self, role: Role, ranks: Sequence[int]) -> None:
        lagging = partial(_still_here, role, ranks)
        await self._registry.versions.until_none(lagging, LEAVE_TIMEOUT_S)

    async def _place(self, parallel: ParallelConfig) -> None:
        """All experts on the EP groups of `parallel`, as few of them moved as can be."""
        state = self._registry.state
        totals = ExpertTotals()
        totals.update(state)
        level = ((1.0,) * self._model.moe.num_experts,) * len(state.placement.layers)
        loads: Sequence[Sequence[float]] = level if totals.load is None else totals.load.tokens
        layers = [
            LayerPlacement.of(
                layer.layer_id,
                resized(layer.held(state.placement.ep_size), load, parallel.ep_size),
            )
            for layer, load in zip(state.placement.layers, loads, strict=True)
        ]
        await self._leader.change(layers, parallel, timeout_s=ARRIVAL_TIMEOUT_S)


def _not_ready(role: Role, ranks: Sequence[int], state: ClusterState) -> list[str]:
    ready = {m.rank for m in state.tier(role) if m.state is MemberState.READY}
    return [f"{role} {rank} is not ready" for rank in ranks if rank not in ready]


def _still_here(role: Role, ranks: Sequence[int], state: ClusterState) -> list[str]:
    return [f"{role} {m.rank} is {m.state}" for m in state.tier(role) if m.rank in ranks]


def _size(parallel: ParallelConfig, role: Role) -> int:
    return parallel.attn_devices if role is Role.ATTN else parallel.expert_devices


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) > MOST_NAMED and isinstance(ranks, range):
        return f"{ranks[0]} to {ranks[-1]}"
    return listed([str(rank) for rank in ranks])
