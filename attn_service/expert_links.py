"""This attention process's links to all expert processes, kept as the cluster state says.

Knows members, their starts (`instance_epoch`) and when a link is to be made anew. Knows no
wire and no model: how to connect and how links become `Experts` are its arguments.

A link that is lost stays in use until its successor is there, so that what needs it fails with
the name of the peer that is gone.
"""

from collections.abc import Awaitable, Callable, Sequence

import structlog
from torch import Tensor

from attn_service.experts import Experts, PendingExperts, StepKey
from moe_core.cluster import ClusterState, LinkStats, Member, MemberState, Role
from moe_core.errors import PeerLostError, PeerTimeoutError
from moe_core.transport.base import ExpertLink

log = structlog.get_logger(__name__)

Connect = Callable[[Member], Awaitable[ExpertLink]]
MakeExperts = Callable[[Sequence[ExpertLink]], Experts]


class ExpertLinks:
    """Is an `Experts` itself, once `reconcile` has connected every expert process."""

    def __init__(self, size: int, connect: Connect, make_experts: MakeExperts) -> None:
        self._size = size
        self._connect = connect
        self._make_experts = make_experts
        self._links: dict[int, ExpertLink] = {}
        self._epochs: dict[int, int] = {}
        self._experts: Experts | None = None
        self.missing: tuple[str, ...] = ("no expert process has been connected yet",)

    async def dispatch(
        self,
        key: StepKey,
        layer_id: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
    ) -> PendingExperts:
        """See `Experts.dispatch`."""
        if self._experts is None:
            raise PeerLostError(f"layer {layer_id} cannot be computed: {'; '.join(self.missing)}")
        return await self._experts.dispatch(key, layer_id, hidden_states, topk_ids, topk_weights)

    async def reconcile(self, state: ClusterState) -> None:
        """Connect every READY expert process that has no link, a lost one, or one to an earlier
        start of it. What cannot be reached now is in `missing`, and is tried again by the next
        call. Raises ProtocolError for a peer that does not fit this process."""
        ready = {m.rank: m for m in state.tier(Role.EXPERT) if m.state is MemberState.READY}
        problems = [await self._connect_if_needed(member) for member in ready.values()]
        absent = [
            f"expert {rank}: {self._lost(rank) or 'not ready'}"
            for rank in range(self._size)
            if rank not in ready and (rank not in self._links or self._lost(rank))
        ]
        self.missing = (*filter(None, problems), *absent)

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
            )
            for rank, link in sorted(self._links.items())
        )

    async def close(self) -> None:
        for link in self._links.values():
            await link.close()

    def _lost(self, rank: int) -> str | None:
        link = self._links.get(rank)
        return None if link is None else link.lost_because

    async def _connect_if_needed(self, member: Member) -> str | None:
        """Why `member` has no working link now, or None."""
        same_start = self._epochs.get(member.rank) == member.instance_epoch
        if same_start and self._lost(member.rank) is None:
            return None
        try:
            link = await self._connect(member)
        except (PeerLostError, PeerTimeoutError) as error:
            log.warning("an expert process cannot be reached", reason=str(error))
            return f"expert {member.rank}: {error}"
        await self._replace(member, link)
        return None

    async def _replace(self, member: Member, link: ExpertLink) -> None:
        old = self._links.get(member.rank)
        self._links[member.rank] = link
        self._epochs[member.rank] = member.instance_epoch
        if len(self._links) == self._size:
            self._experts = self._make_experts([self._links[r] for r in range(self._size)])
        if old is not None:
            await old.close()
