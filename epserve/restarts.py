"""When a process that has ended is started again, and when no more.

Knows a clock and the deaths of one process. Knows no process.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LONGEST_END_S = 10.0  # from a process's being ended on purpose until it is dead


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """A pause doubles with each death that counts. Deaths count for `within_s` seconds; those
    before the process has been ready count until it is ready, since it may take long to fail."""

    deaths: int = 5
    within_s: float = 60.0
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0

    def rest_s(self, deaths: Sequence[float], now: float) -> float:
        """Seconds until a process that died at these times, in their order, can be ended on purpose
        and is still started again: with one death to spare, which nobody meant."""
        most = max(1, self.deaths - 2)
        if len(deaths) < most:
            return 0.0
        return max(0.0, deaths[-most] + self.within_s + LONGEST_END_S - now)

    def __str__(self) -> str:
        return f"{self.deaths} times within {self.within_s:g} s or without being ready"


class Deaths:
    """Of one process, whatever its id."""

    def __init__(self, limits: RestartLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._recent: deque[float] = deque()
        self._before_ready = 0
        self._is_ready = False

    def ready(self) -> None:
        """The process that runs now has been ready."""
        self._is_ready = True
        self._before_ready = 0

    def pause_s(self) -> float | None:
        """Notes a death; the seconds until the next start, or None: there is to be none."""
        now, limits = self._clock(), self._limits
        self._before_ready += not self._is_ready
        self._is_ready = False
        self._recent.append(now)
        while now - self._recent[0] > limits.within_s:
            self._recent.popleft()
        count = max(len(self._recent), self._before_ready)
        if count >= limits.deaths:
            return None
        return min(limits.first_pause_s * 2.0 ** (count - 1), limits.longest_pause_s)
