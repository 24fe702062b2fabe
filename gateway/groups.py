"""The DP groups of the attention tier, as a cluster's state shows them, and which can be used.

Knows members and their states. Keeps nothing, and knows no request.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from moe_core.cluster import AttentionLoad, ClusterState, Member, MemberState, Role
from moe_core.errors import UnavailableError
from moe_core.listing import listed

GroupKey: TypeAlias = tuple[int, int]
"""dp_rank and the leader's instance_epoch: a group that forms again is another."""


@dataclass(frozen=True, slots=True)
class Group:
    """A DP group that can be used: all its tp ranks are READY. `leader` is tp_rank 0."""

    dp_rank: int
    leader: Member
    load: AttentionLoad

    @property
    def key(self) -> GroupKey:
        return self.dp_rank, self.leader.instance_epoch

    @property
    def name(self) -> str:
        return f"attention group dp_rank={self.dp_rank} at {self.leader.address}"

    @property
    def kv_tokens(self) -> int:
        """The tokens that the group's whole KV pool holds."""
        return self.load.total_kv_blocks * self.load.kv_block_size


def attention_groups(state: ClusterState) -> Iterator[tuple[int, tuple[Member, ...]]]:
    """dp_rank and the joined members, in tp order, of every DP group of the configuration."""
    groups: dict[int | None, list[Member]] = {}
    for member in state.tier(Role.ATTN):
        groups.setdefault(member.dp_rank, []).append(member)
    for dp_rank in range(state.parallel.dp_size):
        yield dp_rank, tuple(groups.get(dp_rank, ()))


def usable_groups(state: ClusterState) -> tuple[Group, ...]:
    """The DP groups that can take a request now, in rank order."""
    groups = []
    for dp_rank, members in attention_groups(state):
        whole = len(members) == state.parallel.tp_size
        ready = all(member.state is MemberState.READY for member in members)
        if whole and ready and not _leaves(members) and members[0].attention_load is not None:
            groups.append(Group(dp_rank, members[0], members[0].attention_load))
    return tuple(groups)


def known_groups(state: ClusterState) -> tuple[Group, ...]:
    """The DP groups that can be asked what they have, whether or not they take requests."""
    return tuple(
        Group(dp_rank, members[0], members[0].attention_load)
        for dp_rank, members in attention_groups(state)
        if members and members[0].tp_rank == 0 and members[0].attention_load is not None
    )


def leaving_groups(state: ClusterState) -> frozenset[GroupKey]:
    """The DP groups that drain, or are asked to."""
    return frozenset(
        (dp_rank, members[0].instance_epoch)
        for dp_rank, members in attention_groups(state)
        if members and _leaves(members)
    )


def _leaves(members: Iterable[Member]) -> bool:
    return any(each.leaving or each.state is MemberState.DRAINING for each in members)


def none_usable(state: ClusterState) -> UnavailableError:
    """What a request is refused with that no group can take."""
    return UnavailableError(
        f"no attention group can take a request: {why_unusable(state)}. The cluster is still "
        "starting, is being stopped, or has lost processes; try again once `epserve status` shows "
        "the gateway ready"
    )


def why_unusable(state: ClusterState) -> str:
    """What keeps attention groups from taking requests, member by member."""
    missing = [*state.missing(Role.ATTN), *state.missing(Role.EXPERT)]
    leaving = [f"attn {each.rank}: leaving" for each in state.tier(Role.ATTN) if each.leaving]
    return listed([*missing, *leaving], "; ") or "no load has been reported yet"
