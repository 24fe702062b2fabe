"""Takes the cluster from one placement of its experts to the next, while it serves.

Knows the order of things: publish the next placement, wait until whoever holds something under it
has said that it can serve it, make it the placement, wait until no step uses the one before. Knows
no load, and no reason why experts should be elsewhere.

Invariants: one change at a time. Until the next placement has become the placement nobody uses it,
so a change that fails is taken back by forgetting it. No epoch is given out twice: a process that
has prepared for one that was taken back cannot be mistaken for one that has prepared for another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import structlog

from gateway.cluster import Registry
from moe_core.cluster import ClusterState, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from moe_core.placement import ExpertPlacement, LayerPlacement

log = structlog.get_logger(__name__)

ADOPT_TIMEOUT_S = 60.0
_GONE = (MemberState.DRAINING, MemberState.FAILED)


class PlacementLeader:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._under_way = ""
        self._last_epoch = 0

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Nobody else changes the cluster meanwhile. Raises UnavailableError naming what is under
        way."""
        if self._under_way:
            raise UnavailableError(f"{what} has to wait: {self._under_way} is under way")
        self._under_way = what
        try:
            yield
        finally:
            self._under_way = ""

    async def change(
        self, layers: Sequence[LayerPlacement], parallel: ParallelConfig, *, timeout_s: float
    ) -> ExpertPlacement:
        """Place all MoE layers as `layers` says, on the tier sizes of `parallel`; only within a
        `turn`. Returns the placement that is used from then on.

        Raises UnavailableError when a process that is to hold something is lost, refuses, or is not
        prepared within `timeout_s`: then all is as it was. When attention processes do not take it
        up within ADOPT_TIMEOUT_S it raises that too, and the new placement stays.
        """
        now = self._registry.state.placement
        wanted = ExpertPlacement(
            self._next_epoch(), now.num_logical_experts, parallel.ep_size, tuple(layers)
        )
        self._registry.set_next(wanted)
        try:
            preparation = _Preparation(wanted, parallel, self._registry.state)
            await self._registry.until_none(preparation, timeout_s)
        except BaseException as error:
            self._registry.set_next(None)
            log.warning("a placement was taken back", epoch=wanted.epoch, reason=str(error))
            raise
        self._registry.set_placement(wanted, parallel)
        log.info("placement", epoch=wanted.epoch, ep_size=wanted.ep_size)
        await self._registry.until_none(partial(_not_adopted, wanted.epoch), ADOPT_TIMEOUT_S)
        return wanted

    def _next_epoch(self) -> int:
        """Members may know of epochs that a gateway before this one has given out."""
        state = self._registry.state
        known = [member.prepared_epoch or 0 for member in state.members]
        self._last_epoch = max(self._last_epoch, state.placement.epoch, *known) + 1
        return self._last_epoch


class _Preparation:
    """Who has still to prepare for `wanted`. Raises UnavailableError when one of them is lost, or
    cannot."""

    def __init__(
        self, wanted: ExpertPlacement, parallel: ParallelConfig, state: ClusterState
    ) -> None:
        self._epoch = wanted.epoch
        self._starts = {m.rank: m.instance_epoch for m in state.tier(Role.EXPERT)}
        self._holders = [
            rank
            for rank in range(parallel.expert_devices)
            if parallel.expert_ranks(rank)[0] in wanted.holders
        ]

    def __call__(self, state: ClusterState) -> list[str]:
        present = {member.rank: member for member in state.tier(Role.EXPERT)}
        lagging = []
        for rank in self._holders:
            member = present.get(rank)
            if member is None or member.instance_epoch != self._starts.get(rank):
                raise UnavailableError(f"expert {rank} was lost before it had its experts")
            if member.state in _GONE:
                raise UnavailableError(f"expert {rank} is {member.state}: {member.detail}")
            if member.refused_epoch == self._epoch:
                raise UnavailableError(f"expert {rank} refuses: {member.detail}")
            if (member.prepared_epoch or 0) < self._epoch:
                lagging.append(f"expert {rank} is not prepared for placement epoch {self._epoch}")
        return lagging


def _not_adopted(epoch: int, state: ClusterState) -> list[str]:
    """An attention process that has not said what it uses has run no step yet."""
    return [
        f"{member.role} {member.rank} may still use placement epoch {member.used_epoch}"
        for member in state.tier(Role.ATTN)
        if member.state is not MemberState.FAILED
        and member.used_epoch is not None
        and member.used_epoch < epoch
    ]
