"""Whose request is next: weighted fair shares between callers.

Knows callers, their weights and the tokens charged to them. Knows no clock, no event loop and not
what is queued.

Each caller has a counter of the tokens it was charged, divided by its weight; next is the waiting
caller whose counter is lowest. Tokens are charged as they are served, so nobody has to guess how
long an answer will be. A caller that joins the waiting ones is lifted to the lowest counter among
them, or to that of the last who waited: who was idle has saved up nothing.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Generic, TypeVar

from gateway.callers import Caller

Item = TypeVar("Item")
_RANK = itemgetter(0)


@dataclass(slots=True)
class _Account(Generic[Item]):
    charged: float = 0.0  # tokens / weight
    waiting: list[tuple[tuple[int, int], Item]] = field(default_factory=list)  # by rank


class FairQueue(Generic[Item]):
    """Between callers fair by weight; within a caller by priority (lower first), then arrival.

    Invariant: an account with something waiting is in `_waiting`, and no other is.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account[Item]] = {}
        self._waiting: dict[str, _Account[Item]] = {}
        self._ranks: dict[Item, tuple[str, tuple[int, int]]] = {}
        self._arrivals = 0
        self._last: _Account[Item] | None = None  # the last to leave the waiting ones

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[Item]:
        return iter(tuple(self._ranks))

    def push(self, caller: Caller, item: Item, priority: int = 0) -> None:
        """Queue `item`, which is not queued yet."""
        account = self._accounts.setdefault(caller.name, _Account())
        if not account.waiting:
            account.charged = max(account.charged, self._floor())
            self._waiting[caller.name] = account
        self._arrivals += 1
        rank = priority, self._arrivals
        insort(account.waiting, (rank, item), key=_RANK)
        self._ranks[item] = caller.name, rank

    def peek(self) -> Item | None:
        """Who is next. Of callers with equal counters it is the one whose first came earlier."""
        if not self._waiting:
            return None
        best = min(self._waiting.values(), key=_turn)
        return best.waiting[0][1]

    def remove(self, item: Item) -> None:
        """Take `item` out, wherever it stands; without effect where it is not queued."""
        name, rank = self._ranks.pop(item, ("", (0, 0)))
        if not name:
            return
        account = self._waiting[name]
        del account.waiting[bisect_left(account.waiting, rank, key=_RANK)]
        if not account.waiting:
            del self._waiting[name]
            self._last = account

    def charge(self, caller: Caller, tokens: int) -> None:
        """Count tokens that `caller` was served, whether it has something waiting or not."""
        self._accounts[caller.name].charged += tokens / caller.weight

    def _floor(self) -> float:
        if self._waiting:
            return min(account.charged for account in self._waiting.values())
        return 0.0 if self._last is None else self._last.charged


def _turn(account: _Account[Item]) -> tuple[float, int]:
    (_, arrival), _item = account.waiting[0]
    return account.charged, arrival
