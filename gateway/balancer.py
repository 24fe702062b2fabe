"""Which DP group a request goes to.

Knows groups, their load and what was sent to them since they last reported it. Knows no stream
and no request beyond the KV blocks it may need.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from gateway.cluster import attention_groups
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


@dataclass(slots=True)
class _Sent:
    load: AttentionLoad  # the report since which it was sent
    sequences: int = 0
    blocks: int = 0


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


def require_groups(state: ClusterState) -> tuple[Group, ...]:
    """The usable groups. Raises UnavailableError naming what is missing when there is none."""
    groups = usable_groups(state)
    if not groups:
        raise UnavailableError(
            f"no attention group can take a request: {why_unusable(state)}. The cluster is still "
            "starting, or has lost processes; try again once `epserve status` shows the gateway "
            "ready"
        )
    return groups


def why_unusable(state: ClusterState) -> str:
    """What keeps attention groups from taking requests, member by member."""
    missing = [*state.missing(Role.ATTN), *state.missing(Role.EXPERT)]
    leaving = [f"attn {each.rank}: leaving" for each in state.tier(Role.ATTN) if each.leaving]
    return listed([*missing, *leaving], "; ") or "no load has been reported yet"


class Balancer:
    """Spreads requests by free KV blocks and queue length.

    Reports come about once a second; between two of them a group counts as holding what was
    sent to it since the last, so that a burst does not all go to one group.
    """

    def __init__(self) -> None:
        self._sent: dict[int, _Sent] = {}

    def choose(self, groups: Iterable[Group], num_tokens: int, num_choices: int = 1) -> Group:
        """The group for a request of so many choices of `num_tokens` (prompt and output) each,
        which count as sent.

        Groups that can start it at once come first, and of those the emptiest; otherwise the
        one with the shortest queue. Only groups whose whole pool could hold it are considered;
        raises UnavailableError when there is none.
        """
        fitting = [group for group in groups if group.kv_tokens >= num_tokens]
        if not fitting:
            raise UnavailableError(f"no attention group's KV pool holds {num_tokens} tokens now")
        best = min(fitting, key=lambda group: self._cost(group, num_tokens, num_choices))
        sent = self._since_report(best)
        sent.sequences += num_choices
        sent.blocks += _blocks(best, num_tokens) * num_choices
        return best

    def _cost(
        self, group: Group, num_tokens: int, num_choices: int
    ) -> tuple[bool, int, float, int, int]:
        sent = self._since_report(group)
        free = group.load.free_kv_blocks - sent.blocks
        waits = group.load.num_waiting > 0 or free < _blocks(group, num_tokens) * num_choices
        queue = group.load.num_waiting + (sent.sequences if waits else 0)
        used_share = 1 - free / group.load.total_kv_blocks
        return waits, queue, used_share, group.load.num_running + sent.sequences, group.dp_rank

    def _since_report(self, group: Group) -> _Sent:
        sent = self._sent.get(group.dp_rank)
        if sent is None or sent.load is not group.load:
            sent = self._sent[group.dp_rank] = _Sent(group.load)
        return sent


def _blocks(group: Group, num_tokens: int) -> int:
    return -(-num_tokens // group.load.kv_block_size)
