"""Who is in the cluster: ranks are given out here, and every change makes a new ClusterState.

Knows members, their reports and their leases. Knows no stream (cluster_servicer.py does) and no
request. State is soft: it is what the workers that are joined now have said.

A load or a link total changes all the time and concerns only this process, so it shows in
`state` at once but does not make a new version; whatever peers act upon does.
"""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from moe_core.cluster import (
    ClusterState,
    ExpertLoad,
    Join,
    Member,
    MemberState,
    Role,
    StatusReport,
)
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import NotFoundError, RequestError
from moe_core.placement import ExpertPlacement

STALLED_MS = 5_000
STALLED = f"event loop without progress for over {STALLED_MS // 1000} s"


@dataclass(frozen=True, slots=True)
class MemberKey:
    """Names one start of one process; a successor of the same rank has another epoch."""

    role: Role
    rank: int
    instance_epoch: int


class Registry:
    """The cluster as its gateway knows it. Belongs to one event loop."""

    def __init__(
        self,
        gateway: Member,
        parallel: ParallelConfig,
        placement: ExpertPlacement,
        fingerprint: str,
    ) -> None:
        self._parallel = parallel
        self._placement = placement
        self._next_placement: ExpertPlacement | None = None
        self._fingerprint = fingerprint
        self._gateway = gateway
        self._members: dict[tuple[Role, int], Member] = {}
        self._dtypes: dict[tuple[Role, int], str] = {}
        self._stalled: set[tuple[Role, int]] = set()
        self._version = 1
        self.queued_requests = 0  # of this gateway
        self._changed = asyncio.Event()

    @property
    def parallel(self) -> ParallelConfig:
        return self._parallel

    @property
    def state(self) -> ClusterState:
        gateway = replace(self._gateway, queued_requests=self.queued_requests)
        members = (gateway, *(self._shown(place) for place in self._members))
        return ClusterState(
            self._version,
            self._parallel,
            members,
            self._placement,
            next_placement=self._next_placement,
        )

    async def newer_than(self, version: int) -> ClusterState:
        """Waits for a state whose version is above `version`; without a deadline, since a
        cluster may stay as it is for ever."""
        while self._version <= version:
            await self._changed.wait()
        return self.state

    def join(self, join: Join) -> MemberKey:
        """Give a worker its rank. Raises RequestError for a role, rank, model or dtype that
        does not fit, naming both sides' values."""
        if join.role is Role.GATEWAY:
            raise RequestError("role=gateway: only attn and expert processes join a gateway")
        self._check_same_model(join)
        rank = self._free_rank(join)
        place = (join.role, rank)
        self._members[place] = self._new_member(join, rank)
        self._dtypes[place] = join.dtype
        self._publish()
        return MemberKey(join.role, rank, join.instance_epoch)

    def report(self, key: MemberKey, report: StatusReport) -> None:
        """Replace what a member says of itself."""
        old = self._find(key)
        new = replace(
            old,
            state=report.state,
            detail=report.detail,
            store_address=report.store_address,
            attention_load=report.attention_load,
            engine_metrics=report.engine_metrics,
            links=report.links,
            prepared_epoch=report.prepared_epoch,
            used_epoch=report.used_epoch,
        )
        self._members[key.role, key.rank] = new
        if _visible(old) != _visible(new):
            self._publish()

    def report_expert_load(self, key: MemberKey, load: ExpertLoad) -> None:
        """Replace a member's expert load. Raises RequestError unless it has the shape of the
        model's experts."""
        member = self._find(key)
        layer_ids = tuple(layer.layer_id for layer in self._placement.layers)
        num_experts = self._placement.num_logical_experts
        if load.layer_ids != layer_ids or {*map(len, load.tokens)} != {num_experts}:
            raise RequestError(
                f"expert_load: {key.role} {key.rank} reports {sum(map(len, load.tokens))} counts "
                f"of {len(load.layer_ids)} layers; this model has {num_experts} experts in each "
                f"of its MoE layers {', '.join(map(str, layer_ids))}"
            )
        self._members[key.role, key.rank] = replace(member, expert_load=load)

    def lease(self, key: MemberKey, loop_idle_ms: int) -> None:
        """Note how long a member's event loop has been without progress, in milliseconds."""
        self._find(key)
        place = (key.role, key.rank)
        stalled = loop_idle_ms >= STALLED_MS
        if stalled != (place in self._stalled):
            self._stalled ^= {place}
            self._publish()

    def leave(self, key: MemberKey) -> None:
        """Remove a member; without effect once a successor has its rank."""
        member = self._members.get((key.role, key.rank))
        if member is None or member.instance_epoch != key.instance_epoch:
            return
        place = (key.role, key.rank)
        del self._members[place], self._dtypes[place]
        self._stalled.discard(place)
        self._publish()

    def set_next(self, placement: ExpertPlacement | None) -> None:
        """What expert processes are to prepare for; None: nothing any more."""
        self._next_placement = placement
        self._count_experts()
        self._publish()

    def set_placement(self, placement: ExpertPlacement, parallel: ParallelConfig) -> None:
        """What is used from now on, and the sizes that go with it."""
        self._placement, self._parallel, self._next_placement = placement, parallel, None
        self._count_experts()
        self._publish()

    def set_leaving(self, role: Role, ranks: Iterable[int], leaving: bool = True) -> None:
        """Ask members to drain and to leave, or no longer; without effect on ranks that are not
        joined."""
        for place in [(role, rank) for rank in ranks]:
            if place in self._members:
                self._members[place] = replace(self._members[place], leaving=leaving)
        self._publish()

    def set_address(self, address: str) -> None:
        """Where this gateway listens, once its port is bound."""
        self._gateway = replace(self._gateway, address=address)
        self._publish()

    def set_gateway(self, state: MemberState, detail: str = "") -> None:
        """What the gateway says of itself."""
        if (self._gateway.state, self._gateway.detail) != (state, detail):
            self._gateway = replace(self._gateway, state=state, detail=detail)
            self._publish()

    def _count_experts(self) -> None:
        """Where the placement has changed, so has what expert processes hold."""
        for place, member in self._members.items():
            if member.ep_rank is not None:
                self._members[place] = replace(member, experts=self._num_experts(member.ep_rank))

    def _num_experts(self, ep_rank: int) -> int:
        """The most that one layer needs there, in what is used and in what is prepared."""
        placements = filter(None, (self._placement, self._next_placement))
        held = max(placement.num_local_experts(ep_rank) for placement in placements)
        return held + self._parallel.shared_on_experts

    def _publish(self) -> None:
        self._version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _find(self, key: MemberKey) -> Member:
        member = self._members.get((key.role, key.rank))
        if member is None or member.instance_epoch != key.instance_epoch:
            raise NotFoundError(
                f"{key.role} {key.rank} with instance_epoch {key.instance_epoch} is not joined"
            )
        return member

    def _shown(self, place: tuple[Role, int]) -> Member:
        member = self._members[place]
        if place not in self._stalled:
            return member
        return replace(member, detail="; ".join(filter(None, (member.detail, STALLED))))

    def _check_same_model(self, join: Join) -> None:
        if join.model_fingerprint != self._fingerprint:
            raise RequestError(
                f"model_fingerprint={join.model_fingerprint}: the {join.role} process at "
                f"{join.address} has another model than the gateway, whose fingerprint is "
                f"{self._fingerprint}; start both with the same --model"
            )
        for (role, rank), dtype in self._dtypes.items():
            if dtype != join.dtype:
                raise RequestError(
                    f"dtype={join.dtype}: {role} {rank} has joined with dtype={dtype}, and all "
                    f"processes need the same; start the {join.role} process at {join.address} "
                    f"with --dtype {dtype}"
                )

    def _free_rank(self, join: Join) -> int:
        size = self.state.size(join.role)
        free = [rank for rank in range(size) if (join.role, rank) not in self._members]
        if join.rank is None and free:
            return free[0]
        if join.rank in free:
            return join.rank
        free_ranks = ", ".join(map(str, free)) or "none"
        tier = f"the {join.role} tier has {size} processes, free ranks: {free_ranks}"
        if join.rank is None:
            raise RequestError(f"rank: none is left for {join.address}; {tier}")
        if join.rank >= size:
            raise RequestError(f"rank={join.rank}: must be below {size}; {tier}")
        holder = self._members[join.role, join.rank]
        raise RequestError(
            f"rank={join.rank}: taken by pid {holder.pid} at {holder.address}; {tier}"
        )

    def _new_member(self, join: Join, rank: int) -> Member:
        member = Member(
            role=join.role,
            rank=rank,
            pid=join.pid,
            address=join.address,
            device=join.device,
            state=MemberState.LOADING,
            instance_epoch=join.instance_epoch,
            host_id=join.host_id,
        )
        if join.role is Role.ATTN:
            dp_rank, tp_rank = self._parallel.attention_ranks(rank)
            return replace(member, dp_rank=dp_rank, tp_rank=tp_rank)
        ep_rank, etp_rank = self._parallel.expert_ranks(rank)
        experts = self._num_experts(ep_rank)
        return replace(member, ep_rank=ep_rank, etp_rank=etp_rank, experts=experts)


def _visible(member: Member) -> tuple[object, ...]:
    """What of a report others act upon: of a load, only that there is one."""
    has_load = member.attention_load is not None
    epochs = member.prepared_epoch, member.used_epoch
    return member.state, member.detail, member.store_address, has_load, epochs


def attention_groups(state: ClusterState) -> Iterator[tuple[int, tuple[Member, ...]]]:
    """dp_rank and the joined members, in tp order, of every DP group of the configuration."""
    groups: dict[int | None, list[Member]] = {}
    for member in state.tier(Role.ATTN):
        groups.setdefault(member.dp_rank, []).append(member)
    for dp_rank in range(state.parallel.dp_size):
        yield dp_rank, tuple(groups.get(dp_rank, ()))
