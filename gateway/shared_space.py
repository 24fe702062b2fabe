"""Bounded space that callers share so that none can fill it alone.

Knows amounts, of whatever kind. A caller with a key may take more while it then holds no more than
was free before: one that floods gets half, two get a third each, and whoever comes next still finds
room. Where there are no keys, the one anonymous caller gets everything.
"""

from gateway.callers import ANONYMOUS, Caller


class SharedSpace:
    """Invariant: what is held adds up to `used`, which is at most `size`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self._held: dict[str, int] = {}

    def held(self, caller: Caller) -> int:
        return self._held.get(caller.name, 0)

    def fits(self, caller: Caller, amount: int) -> bool:
        """Whether `caller` may take so much more now. What finds everything empty always may."""
        if self.used == 0 < self.size:
            return True
        if self.used + amount > self.size:
            return False
        return caller == ANONYMOUS or self.held(caller) + amount <= self.size - self.used

    def take(self, caller: Caller, amount: int) -> None:
        """Hold `amount` more, which fits."""
        self.used += amount
        self._held[caller.name] = self.held(caller) + amount

    def give_back(self, caller: Caller, amount: int) -> None:
        """Hold so much less."""
        self.used -= amount
        left = self._held.pop(caller.name, 0) - amount
        if left:
            self._held[caller.name] = left
