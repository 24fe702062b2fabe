"""Keeps what this process holds in step with the cluster's placements.

Knows which placements somebody may use, what of them is yet to be loaded, and what nobody needs any
more. Loads one expert after the other while the process serves, so that a placement that is
withdrawn costs no more than that. Knows no file and no wire: where an expert comes from is its
source's business.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import structlog
import torch

from expert_service.batcher import Batcher
from expert_service.expert_runner import ExpertRunner
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.errors import ConfigError, EpserveError
from moe_core.model.weights import ExpertWeights
from moe_core.placement import ExpertPlacement
from moe_core.service.membership import Membership

log = structlog.get_logger(__name__)

RETRY_S = 0.01
MAX_PAUSE_S = 1.0
# What a load may fail with and leave the process as it was.
FAILURES = (EpserveError, OSError, MemoryError, torch.OutOfMemoryError)

Plan = tuple[ExpertPlacement, ...]


class ExpertSource(Protocol):
    async def expert(self, layer_id: int, logical: int, state: ClusterState) -> ExpertWeights:
        """One expert, as this process holds them. Raises one of FAILURES."""

    async def rest(self) -> None:
        """Nothing is to be loaded for now. Does not fail."""


class Preparation:
    """`run` belongs to one task; `on_change` is called when `prepared_epoch` or `refusal` has
    changed. spare_slots: the most experts, over all layers, that may be held beyond what the
    placement in use or the next one asks for, whichever is more; None: what memory allows."""

    def __init__(
        self,
        membership: Membership,
        runner: ExpertRunner,
        batcher: Batcher,
        source: ExpertSource,
        on_change: Callable[[], None],
        spare_slots: int | None = None,
    ) -> None:
        self._membership = membership
        self._runner = runner
        self._batcher = batcher
        self._source = source
        self._on_change = on_change
        self._spare_slots = spare_slots
        self._current = runner.served[-1]  # the newest that has been the cluster's placement
        self._refused: ExpertPlacement | None = None
        self.refusal = ""

    @property
    def prepared_epoch(self) -> int:
        """Of the newest placement that is served."""
        return self._runner.served[-1].epoch

    @property
    def refused_epoch(self) -> int | None:
        """Of the next placement, where it cannot be prepared; `refusal` says why."""
        return None if self._refused is None else self._refused.epoch

    async def run(self) -> None:
        """Until the membership is lost. Raises what keeps this process from serving the placement
        that is in use; what keeps it from a next one is `refusal`."""
        plan: Plan = ()
        settled = False
        while True:
            state = self._membership.state
            wanted = self._wanted(state)
            if not settled or wanted != plan:
                plan = wanted
                settled = self._retain(plan)
            todo = next((each for each in plan if each not in self._runner.served), None)
            if todo is not None and self._has_room(todo, plan):
                await self._prepare(todo, plan)
            elif settled:
                await self._source.rest()
                await self._membership.next_state(state)
            else:  # a dispatch of a placement that goes is still queued
                await asyncio.sleep(RETRY_S)

    def _wanted(self, state: ClusterState) -> Plan:
        """By ascending epoch: what a step may still use, what is in use, and what comes next."""
        if state.placement.epoch >= self._current.epoch:  # a new gateway may not know it yet
            self._current = state.placement
        current, coming = self._current, state.next_placement
        oldest = _oldest_used(state) if current in self._runner.served else 0
        kept = (each for each in self._runner.served if oldest <= each.epoch < current.epoch)
        if coming is None or coming != self._refused:
            self._refuse(None)
        if coming is None or coming.epoch <= current.epoch or coming == self._refused:
            return (*kept, current)
        return (*kept, current, coming)

    def _retain(self, plan: Plan) -> bool:
        before, prepared = self._runner.num_experts, self.prepared_epoch
        if not self._batcher.retain(plan):
            return False
        if dropped := before - self._runner.num_experts:
            log.info("experts dropped", experts=dropped, held=self._runner.num_experts)
        if prepared != self.prepared_epoch:
            self._on_change()
        return True

    def _has_room(self, placement: ExpertPlacement, plan: Plan) -> bool:
        """Whether it can be loaded now; what never can be is refused."""
        if self._spare_slots is None or placement == self._current:
            return True
        sizes = [len(self._runner.placed(each)) for each in (self._current, placement)]
        lacking = len(self._runner.lacking(placement))
        if self._runner.num_experts + lacking <= max(sizes) + self._spare_slots:
            return True
        if plan[0] == self._current:  # nothing older is left to go
            needed = self._runner.num_experts + lacking - max(sizes)
            rule = f"placement epoch {placement.epoch} needs {needed}"
            self._refuse(placement, str(ConfigError("spare_expert_slots", self._spare_slots, rule)))
        return False

    async def _prepare(self, placement: ExpertPlacement, plan: Plan) -> None:
        """Load what it lacks and serve it, unless the plan changes meanwhile."""
        lacking = self._runner.lacking(placement)
        gently = bool(self._runner.placed(self._current)) and placement != self._current
        try:
            for layer_id, logical in lacking:
                await self._load(layer_id, logical, gently)
                if self._wanted(self._membership.state) != plan:
                    return
        except FAILURES as error:
            if placement == self._current:
                raise
            self._refuse(placement, str(error))
            return
        self._runner.serve(placement)
        log.info("placement prepared", epoch=placement.epoch, experts_loaded=len(lacking))
        self._on_change()

    async def _load(self, layer_id: int, logical: int, gently: bool) -> None:
        """Half of the time at most, where there are others to serve."""
        started = time.monotonic()
        weights = await self._source.expert(layer_id, logical, self._membership.state)
        self._runner.put(layer_id, logical, weights)
        if gently:
            await asyncio.sleep(min(time.monotonic() - started, MAX_PAUSE_S))

    def _refuse(self, placement: ExpertPlacement | None, reason: str = "") -> None:
        if self._refused == placement:
            return
        self._refused = placement
        self.refusal = reason
        if placement is not None:
            self.refusal = f"placement epoch {placement.epoch} is not prepared: {reason}"
            log.warning("placement refused", epoch=placement.epoch, reason=reason)
        self._on_change()


def still_needed(state: ClusterState, ep_rank: int) -> bool:
    """Whether a step may yet send something to this EP rank, as far as `state` tells."""
    placed = any(layer.physical_experts(ep_rank) for layer in state.placement.layers)
    return placed or (bool(_users(state)) and _oldest_used(state) < state.placement.epoch)


def _oldest_used(state: ClusterState) -> int:
    """No step uses a placement of an older epoch. Who has not said so may use any."""
    used = [member.used_epoch for member in _users(state)]
    known = [epoch for epoch in used if epoch is not None]
    return min(known) if known and len(known) == len(used) else 0


def _users(state: ClusterState) -> list[Member]:
    """Who may have steps under way. Who has failed is out of the cluster until it joins again."""
    return [m for m in state.tier(Role.ATTN) if m.state is not MemberState.FAILED]
