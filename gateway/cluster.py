"""Who is in the cluster: ranks are given out here, and every change makes a new ClusterState.

Knows members, their reports and their leases. Knows no stream (cluster_servicer.py does) and no
request. State is soft: it is what the workers that are joined now have said, sizes and placement
included (takeover.py).

A member is removed when its stream ends. One whose leases do not come while its stream is
formally up is shown as FAILED; from then on its rank may be taken, and the first word that it
says again removes it: it has to join like everybody else.

Gateways that share a registry have one leader, with whom all workers register; the others show
what it tells them (`follow`). Who comes to lead keeps the members that it was told of for
ADOPTED_S, for them to register here.

A load or a link total changes all the time and concerns only this process, so it shows in
`state` at once but does not make a new version; whatever peers act upon does.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gateway.admittance import (
    Place,
    check_same_model,
    has_exited,
    is_same,
    new_member,
    rank_for,
)
from gateway.leases import Clock, LeaseClock
from gateway.takeover import Layout, take_over
from moe_core.cluster import (
    ClusterState,
    ExpertLoad,
    Join,
    Member,
    MemberState,
    Role,
    StatusReport,
    TierSizes,
)
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import NotFoundError, RequestError, UnavailableError
from moe_core.placement import ExpertPlacement

LEASE_LOST_S = 3.0
NO_LEASE = f"no lease for {LEASE_LOST_S:g} s"
ADOPTED_S = 15.0  # longer than a worker takes to notice that its gateway is gone, and to try others
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
        clock: Clock = time.monotonic,
    ) -> None:
        self._layout = Layout(parallel, placement)
        self._next_placement: ExpertPlacement | None = None
        self._target: TierSizes | None = None
        self._fingerprint = fingerprint
        self._gateway = gateway
        self._clock = clock
        self._members: dict[Place, Member] = {}
        self._keys: dict[Place, MemberKey] = {}  # of the registration that holds the place
        self._dtypes: dict[Place, str] = {}
        self._leases: dict[Place, LeaseClock] = {}
        self._stalled: set[Place] = set()
        self._silent: set[Place] = set()
        self._adopted: dict[Place, LeaseClock] = {}
        self._others: tuple[Member, ...] = ()
        self._standing = ""
        self._version = 1
        self._closed = False
        self.queued_requests = self.loop_tasks = 0  # of this gateway
        self._changed = asyncio.Event()

    @property
    def parallel(self) -> ParallelConfig:
        return self._layout.parallel

    @property
    def gateway(self) -> Member:
        """This gateway, as others are to see it."""
        detail = "; ".join(filter(None, (self._gateway.detail, self._standing)))
        return replace(self._gateway, detail=detail)

    @property
    def adopted(self) -> list[str]:
        """Members of an earlier leader that have not registered here yet."""
        return [f"{role} {rank}" for role, rank in self._adopted]

    @property
    def state(self) -> ClusterState:
        """Its first member is this gateway."""
        gateway = replace(
            self.gateway, queued_requests=self.queued_requests, loop_tasks=self.loop_tasks
        )
        members = (gateway, *self._others, *(self._shown(place) for place in self._members))
        return ClusterState(
            self._version,
            self._layout.parallel,
            members,
            self._layout.placement,
            next_placement=self._next_placement,
            target=self._target,
        )

    @property
    def accepted(self) -> ParallelConfig:
        """The sizes that ranks may have: those in force, and those that the tiers grow to."""
        if self._target is None:
            return self.parallel
        return self.parallel.covering(self._target.attn_devices, self._target.expert_devices)

    async def newer_than(self, version: int) -> ClusterState:
        """Waits for a state whose version is above `version`; without a deadline, since a
        cluster may stay as it is for ever."""
        while self._version <= version:
            await self._changed.wait()
        return self.state

    async def until_none(
        self, lagging: Callable[[ClusterState], Iterable[str]], timeout_s: float
    ) -> None:
        """Until `lagging` has nobody left to name. Raises UnavailableError with its last words
        after `timeout_s`, and whatever it raises."""
        state, words = self.state, ""
        try:
            async with asyncio.timeout(timeout_s):
                while words := "; ".join(lagging(state)):
                    state = await self.newer_than(state.version)
        except TimeoutError:
            raise UnavailableError(f"not done within {timeout_s:g} s: {words}") from None

    async def states(self) -> AsyncGenerator[ClusterState, None]:
        """The state now and whenever it has changed, until `close`; who is slow skips some."""
        version = 0
        while True:
            state = await self.newer_than(version)
            if self._closed:
                return
            version = state.version
            yield state

    def close(self) -> None:
        """This gateway leaves: `states` end."""
        self._closed = True
        self._publish()

    def join(self, join: Join) -> MemberKey:
        """Give a worker its rank. Raises RequestError for a role, rank, model, dtype, placement
        or sizes that do not fit, naming both sides' values.

        A rank that is taken is given to another process once its holder is FAILED or has exited,
        and to the same process always: it may have noticed first that its stream is gone."""
        if join.role is Role.GATEWAY:
            raise RequestError("role=gateway: only attn and expert processes join a gateway")
        check_same_model(join, self._fingerprint, self._dtypes)
        layout = take_over(self._layout, join)
        state = replace(self.state, parallel=layout.parallel)
        rank = rank_for(join, state, self._gone())
        self._layout = layout
        place, key = (join.role, rank), MemberKey(join.role, rank, join.instance_epoch)
        known = self._members[place] if place in self._adopted else None
        self._forget(place)
        same = known is not None and is_same(join, known)
        self._members[place] = known if known and same else new_member(join, rank, self.accepted)
        self._keys[place] = key
        self._dtypes[place] = join.dtype
        self._leases[place] = LeaseClock(self._clock)
        self._count_experts()
        self._publish()
        return key

    def require(self, key: MemberKey) -> None:
        """Raises NotFoundError, saying why, unless the registration that `join` gave this very
        `key` still holds its rank."""
        if self._keys.get((key.role, key.rank)) is not key:
            raise _not_joined(key)

    def report(self, key: MemberKey, report: StatusReport) -> None:
        """Replace what a member says of itself. Raises NotFoundError once it has lost its rank,
        or has been FAILED."""
        self.require(key)
        old = self._heard_again(key)
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
            refused_epoch=report.refused_epoch,
        )
        self._members[key.role, key.rank] = new
        if _visible(old) != _visible(new):
            self._publish()

    def report_expert_load(self, key: MemberKey, load: ExpertLoad) -> None:
        """Replace a member's expert load. Raises RequestError unless it has the shape of the
        model's experts."""
        self.require(key)
        member = self._heard_again(key)
        placement = self._layout.placement
        layer_ids = tuple(layer.layer_id for layer in placement.layers)
        num_experts = placement.num_logical_experts
        if load.layer_ids != layer_ids or {*map(len, load.tokens)} != {num_experts}:
            raise RequestError(
                f"expert_load: {key.role} {key.rank} reports {sum(map(len, load.tokens))} counts "
                f"of {len(load.layer_ids)} layers; this model has {num_experts} experts in each "
                f"of its MoE layers {', '.join(map(str, layer_ids))}"
            )
        self._members[key.role, key.rank] = replace(member, expert_load=load)

    def lease(self, key: MemberKey, loop_idle_ms: int, loop_tasks: int = 0) -> None:
        """Note that a member's process lives, how long its event loop has been without progress,
        in milliseconds, and its tasks. Raises NotFoundError as `report` does."""
        member = self._heard_again(key)
        place = (key.role, key.rank)
        if place not in self._leases:  # it registers with the leader
            raise _not_joined(key)
        self._leases[place].heard()
        self._members[place] = replace(member, loop_tasks=loop_tasks)
        stalled = loop_idle_ms >= STALLED_MS
        if stalled != (place in self._stalled):
            self._stalled ^= {place}
            self._publish()

    def check_lease(self, key: MemberKey) -> None:
        """Show a member as FAILED once its leases do not come; to be called every CHECK_S."""
        place = (key.role, key.rank)
        if self._keys.get(place) is not key or place in self._silent:
            return
        if self._leases[place].silent_s() >= LEASE_LOST_S:
            self._silent.add(place)
            self._publish()

    def leave(self, key: MemberKey) -> None:
        """Remove a member; without effect once another registration has its rank."""
        place = (key.role, key.rank)
        if self._keys.get(place) is key:
            self._forget(place)
            self._publish()

    def set_next(self, placement: ExpertPlacement | None) -> None:
        """What expert processes are to prepare for; None: nothing any more."""
        self._next_placement = placement
        self._count_experts()
        self._publish()

    def set_placement(self, placement: ExpertPlacement, parallel: ParallelConfig) -> None:
        """What is used from now on, and the sizes that go with it."""
        self._layout = replace(self._layout, parallel=parallel, placement=placement)
        self._next_placement = None
        self._count_experts()
        self._publish()

    def set_sizes(self, parallel: ParallelConfig, target: TierSizes | None) -> None:
        """The sizes in force, and those that the tiers are to get; None: the same."""
        if (parallel, target) != (self._layout.parallel, self._target):
            self._layout = replace(self._layout, parallel=parallel)
            self._target = target
            self._publish()

    def set_leaving(self, role: Role, ranks: Iterable[int], leaving: bool = True) -> None:
        """Ask members to drain and to leave, or no longer; without effect on ranks that are not
        joined."""
        for place in [(role, rank) for rank in ranks]:
            if place in self._members:
                self._members[place] = replace(self._members[place], leaving=leaving)
        self._publish()

    def follow(self, state: ClusterState, *, news: bool) -> None:
        """What the leading gateway knows. `news`: others may act upon what has changed."""
        self._layout = Layout(state.parallel, state.placement, told=True, settled=True)
        self._next_placement, self._target = state.next_placement, state.target
        members = (member for member in state.members if member.role is not Role.GATEWAY)
        self._members = {(member.role, member.rank): member for member in members}
        if news:
            self._publish()

    def lead(self, layout: Layout | None) -> None:
        """From now on workers register here. `layout` is what is in force, None: what is here.
        What an earlier leader was preparing is given up."""
        self._layout = layout or self._layout
        self._next_placement = self._target = None
        strangers = self._members.keys() - self._keys.keys()
        self._adopted = {place: LeaseClock(self._clock) for place in sorted(strangers)}
        self._count_experts()
        self._publish()

    def stop_leading(self) -> None:
        """Another gateway leads. The members stay until it says who they are."""
        self._members = {place: self._shown(place) for place in self._members}
        for of_registrations in (self._keys, self._dtypes, self._leases, self._adopted):
            of_registrations.clear()
        self._stalled.clear()
        self._silent.clear()
        self._publish()

    def check_adopted(self) -> None:
        """Remove members that have not registered here in time; to be called every CHECK_S."""
        late = [place for place, clock in self._adopted.items() if clock.silent_s() >= ADOPTED_S]
        for place in late:
            self._forget(place)
        if late:
            self._publish()

    def set_gateways(self, own_rank: int, others: Sequence[Member], standing: str) -> None:
        """The gateways that share a registry, and how this one stands to it."""
        known = (self._gateway.rank, self._others, self._standing)
        if known != (own_rank, tuple(others), standing):
            self._gateway = replace(self._gateway, rank=own_rank)
            self._others, self._standing = tuple(others), standing
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
        placements = filter(None, (self._layout.placement, self._next_placement))
        held = max(placement.num_local_experts(ep_rank) for placement in placements)
        return held + self._layout.parallel.shared_on_experts

    def _publish(self) -> None:
        self._version += 1
        if not self._layout.settled and self._is_complete():
            self._layout = replace(self._layout, settled=True)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _is_complete(self) -> bool:
        state = self.state
        return not (state.missing(Role.ATTN) or state.missing(Role.EXPERT))

    def _heard_again(self, key: MemberKey) -> Member:
        """The member of `key`. One that was FAILED is removed instead: others may have gone on
        without it, so it must join again, if its rank is still free."""
        place = (key.role, key.rank)
        member = self._members.get(place)
        if member is None or member.instance_epoch != key.instance_epoch:
            raise _not_joined(key)
        if place in self._silent:
            self._forget(place)
            self._publish()
            raise NotFoundError(f"{key.role} {key.rank} counts as lost, {NO_LEASE}: join again")
        return member

    def _gone(self) -> set[Place]:
        """Ranks whose holders are members only because their streams have not ended yet."""
        own = self._gateway.host_id
        exited = {place for place, member in self._members.items() if has_exited(member, own)}
        return self._silent | exited

    def _forget(self, place: Place) -> None:
        for known in (self._members, self._keys, self._dtypes, self._leases, self._adopted):
            known.pop(place, None)
        self._stalled.discard(place)
        self._silent.discard(place)

    def _shown(self, place: Place) -> Member:
        member = self._members[place]
        if place in self._silent:
            return replace(member, state=MemberState.FAILED, detail=NO_LEASE)
        if place in self._stalled:
            return replace(member, detail="; ".join(filter(None, (member.detail, STALLED))))
        return member


def _not_joined(key: MemberKey) -> NotFoundError:
    return NotFoundError(
        f"{key.role} {key.rank} with instance_epoch {key.instance_epoch} is not joined"
    )


def _visible(member: Member) -> tuple[object, ...]:
    """What of a report others act upon: of a load, only that there is one."""
    has_load = member.attention_load is not None
    epochs = (member.prepared_epoch, member.used_epoch, member.refused_epoch)
    return member.state, member.detail, member.store_address, has_load, epochs


def attention_groups(state: ClusterState) -> Iterator[tuple[int, tuple[Member, ...]]]:
    """dp_rank and the joined members, in tp order, of every DP group of the configuration."""
    groups: dict[int | None, list[Member]] = {}
    for member in state.tier(Role.ATTN):
        groups.setdefault(member.dp_rank, []).append(member)
    for dp_rank in range(state.parallel.dp_size):
        yield dp_rank, tuple(groups.get(dp_rank, ()))
