"""Takes the cluster from one placement of its experts to the next, while it serves.

Knows the order of things: publish the next placement, wait until whoever holds something under it
has said that it can serve it, make it the placement, wait until no step uses the one before. Knows
no load, and no reason why experts should be elsewhere.

What gateways share is written first: an epoch before anybody hears of it, a placement before it is
used. So where this gateway has lost the lead without knowing it, nothing changes.

Invariants: one change at a time. Until the next placement has become the placement nobody uses it,
so a change that fails is taken back by forgetting it. No epoch is given out twice: a process that
has prepared for one that was taken back cannot be mistaken for one that has prepared for another.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import structlog

from gateway.cluster import Registry
from gateway.leadership import Leadership, UndecidedError
from moe_core.cluster import ClusterState, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from moe_core.placement import ExpertPlacement, LayerPlacement

log = structlog.get_logger(__name__)

ADOPT_TIMEOUT_S = 60.0
DECIDE_TIMEOUT_S = 10.0
DECIDE_RETRY_S = 0.5
_GONE = (MemberState.DRAINING, MemberState.FAILED)


class PlacementLeader:
    def __init__(self, registry: Registry, leadership: Leadership) -> None:
        self._registry = registry
        self._leadership = leadership
        self._under_way = ""
        self._last_epoch = 0
        self._deciding: asyncio.Task[None] | None = None

    @property
    def leads(self) -> bool:
        return self._leadership.leads

    @property
    def undecided(self) -> bool:
        """Whether a placement that all have prepared for waits for the shared registry."""
        return self._deciding is not None and not self._deciding.done()

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Nobody else changes the cluster meanwhile. Raises UnavailableError naming what is under
        way, or who leads where this gateway does not."""
        self._leadership.require(what)
        if awaited := self._registry.adopted:
            raise UnavailableError(
                f"{what} has to wait: this gateway has just come to lead, and {', '.join(awaited)} "
                "have yet to register with it"
            )
        if self.undecided:
            raise UnavailableError(f"{what} has to wait: {self._undecided()}")
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
        up within ADOPT_TIMEOUT_S it raises that too, and the new placement stays; and where a
        shared registry does not answer, after which the placement is used once it does.
        """
        now = self._registry.state
        wanted = ExpertPlacement(
            self._next_epoch(), now.placement.num_logical_experts, parallel.ep_size, tuple(layers)
        )
        await self._leadership.publish(now.placement, now.parallel, wanted.epoch)
        self._registry.set_next(wanted)
        try:
            preparation = _Preparation(wanted, parallel, self._registry.state)
            await self._registry.versions.until_none(preparation, timeout_s)
        except BaseException as error:
            self._registry.set_next(None)
            log.warning("a placement was taken back", epoch=wanted.epoch, reason=str(error))
            raise
        self._deciding = asyncio.create_task(self._decide(wanted, parallel), name="decide")
        done, _ = await asyncio.wait({self._deciding}, timeout=DECIDE_TIMEOUT_S)
        if not done:
            raise UnavailableError(self._undecided())
        self._deciding.result()
        await self._registry.versions.until_none(
            partial(_not_adopted, wanted.epoch), ADOPT_TIMEOUT_S
        )
        return wanted

    async def set_sizes(self, parallel: ParallelConfig) -> None:
        """The sizes in force, where no expert moves. Raises as Leadership.publish."""
        placement = self._registry.state.placement
        last_epoch = max(self._last_epoch, self._leadership.last_epoch, placement.epoch)
        await self._leadership.publish(placement, parallel, last_epoch)
        self._registry.set_sizes(parallel, None)

    async def _decide(self, wanted: ExpertPlacement, parallel: ParallelConfig) -> None:
        """All have prepared for `wanted`. It may be in the registry though that has not answered,
        and then another gateway would go on with it: so from here on it is used, unless another
        gateway leads."""
        while True:
            try:
                await self._leadership.publish(wanted, parallel, wanted.epoch)
                break
            except UndecidedError as error:
                log.warning("a placement is undecided", epoch=wanted.epoch, reason=str(error))
                await asyncio.sleep(DECIDE_RETRY_S)
            except UnavailableError as error:
                log.warning("a placement was taken back", epoch=wanted.epoch, reason=str(error))
                self._registry.set_next(None)
                raise
        self._registry.set_placement(wanted, parallel)
        if not self._under_way:  # who asked for it has given up
            self._registry.set_sizes(parallel, None)
        log.info("placement", epoch=wanted.epoch, ep_size=wanted.ep_size)

    def _undecided(self) -> str:
        wanted = self._registry.state.next_placement
        epoch = "" if wanted is None else f" {wanted.epoch}"
        return f"placement epoch{epoch} is prepared, and used once the registry answers"

    def _next_epoch(self) -> int:
        """Members may know of epochs that a gateway before this one has given out."""
        state = self._registry.state
        known = [member.prepared_epoch or 0 for member in state.members]
        given = max(self._last_epoch, self._leadership.last_epoch)
        self._last_epoch = max(given, state.placement.epoch, *known) + 1
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
