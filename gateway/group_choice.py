"""Which DP group takes a request now, if any, and why none does.

Knows the groups that can be used, what room each has, and which have just been lost. Knows no line
and no turn: the waiting room asks for whoever is next.

A group that was lost rests for a moment: whether it is gone is not known yet, and if it is not, it
may be the only one.
"""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Many

from gateway.balancer import Balancer
from gateway.cluster import Registry
from gateway.group_room import GroupRoom, Seat
from gateway.groups import Group, GroupKey, usable_groups, why_unusable
from gateway.requests import Sequence
from moe_core.cluster import ClusterState

REST_S = 1.0


class GroupChoice:
    """`rested` is called when a group that was lost may be chosen again. `choices` are always those
    of one request: they go to one group."""

    def __init__(self, registry: Registry, rested: Callable[[], None]) -> None:
        self._registry = registry
        self._rested = rested
        self._state: ClusterState | None = None  # of `_usable`
        self._usable: tuple[Group, ...] = ()
        self._rooms = GroupRoom()
        self._balancer = Balancer()
        self._resting: dict[GroupKey, asyncio.TimerHandle] = {}

    @property
    def usable(self) -> tuple[Group, ...]:
        """Those that can take a request now, worked out once for each state of the cluster."""
        state = self._registry.state
        if self._state is not state:
            self._state, self._usable = state, usable_groups(state)
        return self._usable

    def free_seats(self, groups: Many[Group]) -> int:
        """See GroupRoom."""
        return self._rooms.free_seats(groups)

    def has_large(self, choices: Many[Sequence]) -> bool:
        """Whether there is a group that could hold them, with room now or without."""
        return bool(self._large(choices))

    def first(self, choices: Many[Sequence]) -> Group | None:
        """For a request that has run nowhere yet: None where it has to wait for room. Raises
        UnavailableError where no group could hold it."""
        large = self._large(choices)
        free = self._with_room(large, choices)
        if not free and (large or self._resting):
            return None
        return self._balancer.choose(free, choices[0].num_tokens, len(choices))

    def another(self, choices: Many[Sequence]) -> Group | None:
        """For a request whose group was lost: one without room where none has. None where no group
        could hold it."""
        large = self._large(choices)
        if not large:
            return None
        free = self._with_room(large, choices)
        return self._balancer.choose(free or large, choices[0].num_tokens, len(choices))

    def take(self, group: Group, choices: Many[Sequence]) -> Seat:
        return self._rooms.take(group, len(choices), _known_tokens(choices))

    def rest(self, group: Group) -> None:
        """It was lost."""
        if group.key not in self._resting:
            loop = asyncio.get_running_loop()
            self._resting[group.key] = loop.call_later(REST_S, self._end_rest, group.key)

    def why_none(self, choices: Many[Sequence]) -> str:
        """Why no group could hold them, group by group."""
        needed = choices[0].num_tokens
        usable = self.usable
        small = [f"{g.name} holds {g.kv_tokens} tokens" for g in usable if g.kv_tokens < needed]
        resting = [f"{g.name} has just been lost" for g in usable if g.key in self._resting]
        if not usable:
            return why_unusable(self._registry.state)
        return "; ".join([*resting, *small]) + f" ({needed} tokens are needed)"

    def _end_rest(self, key: GroupKey) -> None:
        del self._resting[key]
        self._rested()

    def _large(self, choices: Many[Sequence]) -> list[Group]:
        """The groups that can be used now and could hold each of `choices`."""
        needed = choices[0].num_tokens
        return [
            group
            for group in self.usable
            if group.key not in self._resting and group.kv_tokens >= needed
        ]

    def _with_room(self, groups: Many[Group], choices: Many[Sequence]) -> list[Group]:
        count, tokens = len(choices), _known_tokens(choices)
        return [group for group in groups if self._rooms.fits(group, count, tokens)]


def _known_tokens(choices: Many[Sequence]) -> int:
    """Of the prompt, which they share, and of what has been generated."""
    return len(choices[0].prompt_ids) + sum(len(choice.output_ids) for choice in choices)
