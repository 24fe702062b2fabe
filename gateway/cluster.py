"""Who is in the cluster: ranks are given out here, and every change makes a new ClusterState.

Knows members and the layout. Who has registered here and is heard, registrations.py keeps, and who
waits for the next state, state_versions.py. Knows no stream (cluster_servicer.py does) and no
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

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from gateway.admittance import (
    Place,
    check_same_model,
    has_exited,
    is_same,
    new_member,
    rank_for,
)
from gateway.layout import Layout
from gateway.leases import Clock
from gateway.registrations import NO_LEASE, MemberKey, Registrations
from gateway.reports import visible, with_expert_load, with_report
from gateway.state_versions import StateVersions
from gateway.takeover import take_over
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
from moe_core.errors import NotFoundError, RequestError
from moe_core.placement import ExpertPlacement


class Registry:
    """The cluster as its gateway knows it. Belongs to one event loop. `versions` is for who waits
    for `state` to change."""

    def __init__(
        self,
        gateway: Member,
        parallel: ParallelConfig,
        placement: ExpertPlacement,
        fingerprint: str,
        clock: Clock = time.monotonic,
    ) -> None:
        self._layout = Layout(parallel, placement)
        self._fingerprint = fingerprint
        self._gateway = gateway
        self._members: dict[Place, Member] = {}
        self._registrations = Registrations(clock)
        self._others: tuple[Member, ...] = ()
        self._standing = ""
        self.queued_requests = self.loop_tasks = 0  # of this gateway
        self._state: ClusterState | None = None
        self._state_of: tuple[object, ...] = ()
        self.versions = StateVersions(lambda: self.state)

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
        return [f"{role} {rank}" for role, rank in self._registrations.awaited]

    @property
    def state(self) -> ClusterState:
        """Its first member is this gateway. The same object for as long as nothing in it changes:
        every request asks several times."""
        members = tuple(map(self._registrations.shown, self._members.values()))
        own = self._gateway, self._standing, self.queued_requests, self.loop_tasks
        made_of = self._layout, self.versions.current, own, self._others, members
        if self._state is None or self._state_of != made_of:
            gateway = replace(
                self.gateway, queued_requests=self.queued_requests, loop_tasks=self.loop_tasks
            )
            shown = (gateway, *self._others, *members)
            self._state = self._layout.with_members(self.versions.current, shown)
            self._state_of = made_of
        return self._state

    @property
    def accepted(self) -> ParallelConfig:
        """The sizes that ranks may have."""
        return self._layout.accepted

    def join(self, join: Join) -> MemberKey:
        """Give a worker its rank. Raises RequestError for a role, rank, model, dtype, placement
        or sizes that do not fit, naming both sides' values.

        A rank that is taken is given to another process once its holder is FAILED or has exited,
        and to the same process always: it may have noticed first that its stream is gone."""
        if join.role is Role.GATEWAY:
            raise RequestError("role=gateway: only attn and expert processes join a gateway")
        check_same_model(join, self._fingerprint, self._registrations.dtypes)
        layout = take_over(self._layout, join)
        state = replace(self.state, parallel=layout.parallel)
        rank = rank_for(join, state, self._gone())
        self._layout = layout
        key = MemberKey(join.role, rank, join.instance_epoch)
        member = self._members[key.place] if key.place in self._registrations.awaited else None
        if member is None or not is_same(join, member):
            member = new_member(join, rank, self.accepted)
        self._forget(key.place)
        self._members[key.place] = member
        self._registrations.add(key, join.dtype)
        self._count_experts()
        self._publish()
        return key

    def require(self, key: MemberKey) -> None:
        """Raises NotFoundError, saying why, unless the registration that `join` gave this very
        `key` still holds its rank."""
        self._registrations.require(key)

    def report(self, key: MemberKey, report: StatusReport) -> None:
        """Replace what a member says of itself. Raises NotFoundError once it has lost its rank,
        or has been FAILED."""
        self.require(key)
        old = self._heard_again(key)
        new = self._members[key.place] = with_report(old, report)
        if visible(old) != visible(new):
            self._publish()

    def report_expert_load(self, key: MemberKey, load: ExpertLoad) -> None:
        """Replace a member's expert load. Raises as `report`, and RequestError unless it has the
        shape of the model's experts."""
        self.require(key)
        member = self._heard_again(key)
        self._members[key.place] = with_expert_load(member, load, self._layout.placement)

    def lease(self, key: MemberKey, loop_idle_ms: int, loop_tasks: int = 0) -> None:
        """Note that a member's process lives, how long its event loop has been without progress,
        in milliseconds, and its tasks. Raises NotFoundError as `report` does."""
        member = self._heard_again(key)
        is_news = self._registrations.heard(key, loop_idle_ms)
        self._members[key.place] = replace(member, loop_tasks=loop_tasks)
        if is_news:
            self._publish()

    def check_lease(self, key: MemberKey) -> None:
        """Show a member as FAILED once its leases do not come; to be called every CHECK_S."""
        if self._registrations.has_fallen_silent(key):
            self._publish()

    def leave(self, key: MemberKey) -> None:
        """Remove a member; without effect once another registration has its rank."""
        if self._registrations.holds(key):
            self._forget(key.place)
            self._publish()

    def set_next(self, placement: ExpertPlacement | None) -> None:
        """What expert processes are to prepare for; None: nothing any more."""
        self._layout = replace(self._layout, next_placement=placement)
        self._count_experts()
        self._publish()

    def set_placement(self, placement: ExpertPlacement, parallel: ParallelConfig) -> None:
        """What is used from now on, and the sizes that go with it."""
        self._layout = replace(
            self._layout, parallel=parallel, placement=placement, next_placement=None
        )
        self._count_experts()
        self._publish()

    def set_sizes(self, parallel: ParallelConfig, target: TierSizes | None) -> None:
        """The sizes in force, and those that the tiers are to get; None: the same."""
        if (parallel, target) != (self._layout.parallel, self._layout.target):
            self._layout = replace(self._layout, parallel=parallel, target=target)
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
        self._layout = Layout.of(state)
        members = (member for member in state.members if member.role is not Role.GATEWAY)
        self._members = {(member.role, member.rank): member for member in members}
        if news:
            self._publish()

    def lead(self, layout: Layout | None) -> None:
        """From now on workers register here. `layout` is what is in force, None: what is here.
        What an earlier leader was preparing is given up."""
        self._layout = replace(layout or self._layout, next_placement=None, target=None)
        self._registrations.await_all(sorted(self._members.keys() - self._registrations.places))
        self._count_experts()
        self._publish()

    def stop_leading(self) -> None:
        """Another gateway leads. The members stay until it says who they are."""
        shown = self._registrations.shown
        self._members = {place: shown(member) for place, member in self._members.items()}
        self._registrations.forget_all()
        self._publish()

    def check_adopted(self) -> None:
        """Remove members that have not registered here in time; to be called every CHECK_S."""
        late = self._registrations.late
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
                experts = self._layout.num_experts(member.ep_rank)
                self._members[place] = replace(member, experts=experts)

    def _publish(self) -> None:
        if not self._layout.settled and self._is_complete():
            self._layout = replace(self._layout, settled=True)
        self.versions.publish()

    def _is_complete(self) -> bool:
        state = self.state
        return not (state.missing(Role.ATTN) or state.missing(Role.EXPERT))

    def _heard_again(self, key: MemberKey) -> Member:
        """The member of `key`. One that was FAILED is removed instead: others may have gone on
        without it, so it must join again, if its rank is still free."""
        member = self._members.get(key.place)
        if member is None or member.instance_epoch != key.instance_epoch:
            raise key.not_joined()
        if self._registrations.is_silent(key.place):
            self._forget(key.place)
            self._publish()
            raise NotFoundError(f"{key.role} {key.rank} counts as lost, {NO_LEASE}: join again")
        return member

    def _gone(self) -> set[Place]:
        """Ranks whose holders are members only because their streams have not ended yet."""
        own = self._gateway.host_id
        exited = {place for place, member in self._members.items() if has_exited(member, own)}
        return self._registrations.silent | exited

    def _forget(self, place: Place) -> None:
        self._members.pop(place, None)
        self._registrations.forget(place)
