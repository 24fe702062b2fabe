"""For how long nothing has been heard of one member.

Knows a clock and when it was asked. Knows no member, and not what follows from silence.
"""

from collections.abc import Callable

Clock = Callable[[], float]
"""Monotonic seconds."""

CHECK_S = 0.25


class LeaseClock:
    """Counts only the time in which this process was listening: one that was itself stopped or
    busy has heard of nobody, and must not take all others for dead."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard = self._checked = clock()

    def heard(self) -> None:
        """A lease has come."""
        self._heard = self._clock()

    def silent_s(self) -> float:
        """Seconds of silence. To be asked every CHECK_S; what is much more than that between two
        questions does not count."""
        now = self._clock()
        late = now - self._checked - CHECK_S
        if late > CHECK_S:
            self._heard += min(late, now - self._heard)
        self._checked = now
        return now - self._heard
