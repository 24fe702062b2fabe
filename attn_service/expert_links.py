"""This attention process's links to the expert processes, kept as the cluster state says.

Knows members, their starts (`instance_epoch`) and when a link is to be made anew. Knows no
wire and no model: how to connect is its argument, and who uses the links finds them in `Peers`.

A link that is lost stays until its successor is there, so that what needs it fails with the name
of the peer that is gone. One to a process that the cluster takes for FAILED counts as lost, even if
it seems to work: a process that was frozen is met again when it has joined again. Ranks are
followed as they appear: a placement may use more or fewer processes than the cluster was
configured with.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from attn_service.peers import Peers
from moe_core.cluster import ClusterState, LinkStats, Member, MemberState, Role
from moe_core.errors import PeerLostError, PeerTimeoutError, ProtocolError
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import ExpertLink

log = structlog.get_logger(__name__)

Connect = Callable[[Member], Awaitable[ExpertLink]]
# A process that does not answer must not keep the others waiting.
PATIENCE_S = 1.0


class ExpertLinks:
    """etp_size: processes of one EP group."""

    def __init__(self, etp_size: int, connect: Connect) -> None:
        self.peers = Peers(etp_size)
        self._etp_size = etp_size
        self._connect = connect
        self._epochs: dict[int, int] = {}
        self._connecting: dict[int, asyncio.Task[None]] = {}
        self._problems: dict[int, str] = {}
        self.missing: tuple[str, ...] = ("no expert process has been connected yet",)

    async def reconcile(self, state: ClusterState) -> bool:
        """Connect every READY expert process that has no link, a lost one, or one to an earlier
        start of it. What has no link after that is in `missing`, and is tried again by the next
        call. Returns whether there is a new link. Raises ProtocolError for a peer that does not
        fit this process, while there is none that does."""
        self.give_up(state)
        ready = {m.rank: m for m in state.tier(Role.EXPERT) if m.state is MemberState.READY}
        for member in ready.values():
            if member.rank not in self._connecting and self._wants_link(member):
                task = asyncio.create_task(self._make_link(member))
                self._connecting[member.rank] = task
        if self._connecting:
            await asyncio.wait(self._connecting.values(), timeout=PATIENCE_S)
        made = [rank for rank, task in self._connecting.items() if task.done()]
        for rank in made:
            self._connecting.pop(rank).result()
        needed = range(state.placement.ep_size * self._etp_size)
        await self._forget_unused(needed, ready)
        reasons = {rank: self._why_missing(rank, ready) for rank in needed}
        absent = {rank: reason for rank, reason in reasons.items() if reason is not None}
        self.peers.explain_absent(absent)
        self.missing = tuple(f"expert {rank}: {reason}" for rank, reason in absent.items())
        return any(rank not in self._problems for rank in made)

    def give_up(self, state: ClusterState) -> None:
        """Lose the links to processes that the cluster takes for FAILED."""
        for member in state.tier(Role.EXPERT):
            if member.state is MemberState.FAILED and not self._wants_link(member):
                reason = f"the cluster takes it for failed, {member.detail}"
                log.warning("a link is given up", rank=member.rank, reason=reason)
                self.peers.lose(member.rank, reason)

    def can_serve(self, placement: ExpertPlacement) -> bool:
        """Every expert is on some process, or group of them, that is connected."""
        groups = range(placement.ep_size)
        return placement.is_covered_by({rank for rank in groups if self.peers.group(rank)})

    def stats(self, source: str) -> tuple[LinkStats, ...]:
        """Every link's totals since it was made, by rank."""
        return tuple(
            LinkStats(
                source=source,
                target=f"{Role.EXPERT} {rank}",
                transport=link.transport,
                dispatches=link.counters.dispatches,
                dispatch_bytes=link.counters.dispatch_bytes,
                combine_bytes=link.counters.combine_bytes,
                routing_bytes=link.counters.routing_bytes,
                stream_tensor_bytes=link.counters.stream_tensor_bytes,
                doorbells=link.counters.doorbells,
                wait_s=link.counters.wait_s,
                dispatch_tokens=link.counters.dispatch_tokens,
            )
            for rank, link in sorted(self.peers.links.items())
        )

    async def close(self) -> None:
        for task in self._connecting.values():
            task.cancel()
        await asyncio.gather(*self._connecting.values(), return_exceptions=True)
        for link in self.peers.links.values():
            await link.close()

    def _lost(self, rank: int) -> str | None:
        link = self.peers.links.get(rank)
        return None if link is None else link.lost_because

    def _wants_link(self, member: Member) -> bool:
        same_start = self._epochs.get(member.rank) == member.instance_epoch
        return not same_start or self._lost(member.rank) is not None

    async def _make_link(self, member: Member) -> None:
        former = self.peers.links.get(member.rank)
        if former is not None and former.lost_because is not None:
            # First: a peer that is there again can still say that it writes no more.
            await former.close()
        try:
            link = await self._connect(member)
        except (PeerLostError, PeerTimeoutError, ProtocolError) as error:
            if isinstance(error, ProtocolError) and not self.peers.links:
                raise
            self._problems[member.rank] = str(error)
            log.warning("an expert process cannot be used", reason=str(error))
            return
        self._problems.pop(member.rank, None)
        self._epochs[member.rank] = member.instance_epoch
        old = self.peers.put(member.rank, link)
        if old is not None:
            late = old.counters.dropped
            log.info("a link is replaced", peer=old.peer, was=old.lost_because, late_answers=late)
            await old.close()

    async def _forget_unused(self, needed: range, ready: dict[int, Member]) -> None:
        """Lost links to processes that have left and that nothing is placed on."""
        for rank in tuple(self.peers.links):
            if rank not in needed and rank not in ready and self._lost(rank) is not None:
                self._epochs.pop(rank, None)
                link = self.peers.drop(rank)
                if link is not None:
                    await link.close()

    def _why_missing(self, rank: int, ready: dict[int, Member]) -> str | None:
        if rank in self.peers.links and self._lost(rank) is None:
            return None
        problem = self._problems.get(rank) if rank in ready else None
        waiting = "does not answer yet" if rank in self._connecting else "not ready"
        return problem or self._lost(rank) or waiting
