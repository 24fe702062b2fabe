"""Watches a cluster become whole again: when each member that was hit is READY once more.

Knows cluster states over time, and marks the faults that it was given. Injects none.
"""

import asyncio
import time
from collections.abc import Sequence

from epserve.chaos.faults import Cluster, Injected
from moe_core.cluster import ClusterState, MemberState, Role
from moe_core.errors import EpserveError

POLL_S = 0.2


class Recovery:
    """`injected` may grow while this runs; `missing` says who is not READY as of the last look."""

    def __init__(self, cluster: Cluster, injected: Sequence[Injected]) -> None:
        self.missing: tuple[str, ...] = ()
        self._cluster = cluster
        self._injected = injected

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(POLL_S)

    async def until_whole(self, timeout_s: float) -> None:
        """Until everybody is READY, whoever was hit again; or the time is over, and `missing` says
        who is not."""
        until = time.monotonic() + timeout_s
        while True:
            await self.look()
            is_whole = not self.missing and all(i.ready_at is not None for i in self._injected)
            if is_whole or time.monotonic() >= until:
                return
            await asyncio.sleep(POLL_S)

    async def look(self) -> None:
        try:
            state = await self._cluster.cluster()
        except EpserveError as error:  # the gateway may be what was hit: nobody is known then
            self.missing = (f"gateway: {error}",)
            return
        self.missing = tuple(words for role in Role for words in state.missing(role))
        now = time.monotonic()
        for injected in self._injected:
            if injected.ready_at is None and is_ready_again(state, injected):
                injected.ready_at = now


def is_ready_again(state: ClusterState, injected: Injected) -> bool:
    """Whether the fault is over and its member serves: a new process where the old one ended."""
    old = injected.member
    return injected.ended_at is not None and any(
        member.rank == old.rank
        and member.state is MemberState.READY
        and (member.instance_epoch != old.instance_epoch or not injected.fault.ends_process)
        for member in state.tier(old.role)
    )
