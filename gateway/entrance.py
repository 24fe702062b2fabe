"""Who is let into the gateway, and what each request holds while it is there.

Knows the queue's size in requests and bytes, callers' quotas, and the pace at which requests leave
the queue. Knows neither the queue's order nor the attention tier. All checks here are of counts and
sizes, so that a refusal costs microseconds and nothing was spent on what is refused.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gateway.callers import Caller
from gateway.quotas import Quotas
from gateway.shared_space import SharedSpace
from moe_core.errors import EpserveError, TooManyRequestsError

DEFAULT_MAX_QUEUED_REQUESTS = 1024
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
PACE_OF_LAST = 64


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """max_bytes: of the prompts of requests that wait."""

    max_requests: int = DEFAULT_MAX_QUEUED_REQUESTS
    max_bytes: int = 256 * 2**20


@dataclass(slots=True)
class Hold:
    """What one request holds. `queued`: one of the queue's places; `tokens`: of its caller's
    bucket, set aside."""

    caller: Caller
    queued: bool = False
    num_bytes: int = 0
    tokens: int = 0


class Entrance:
    """`clock` counts seconds.

    Invariant: whatever was taken from the queue's space or a quota is in exactly one Hold.
    """

    def __init__(self, limits: QueueLimits, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._places = SharedSpace(limits.max_requests)
        self._bytes = SharedSpace(limits.max_bytes)
        self._quotas = Quotas()
        self._called: deque[float] = deque(maxlen=PACE_OF_LAST)

    @property
    def num_queued(self) -> int:
        """Places of the queue that are taken."""
        return self._places.used

    def enter(self, caller: Caller, num_bytes: int, least_tokens: int, *, queued: bool) -> Hold:
        """Let a request in that takes so many bytes and at least so many tokens; `queued` where it
        cannot start at once. Raises TooManyRequestsError, or RequestError where its caller's
        quota never has so many tokens."""
        hold = Hold(caller)
        try:
            if queued:
                self.queue(hold)
            self.grow(hold, num_bytes)
            self._quotas.check(caller, least_tokens, self._clock())
            self._quotas.enter(caller)
        except EpserveError:
            self.stop_waiting(hold)
            raise
        return hold

    def require_room(self, caller: Caller, *, queued: bool) -> None:
        """Raises TooManyRequestsError where `enter` would for any request of this caller."""
        if queued:
            self._require_place(caller)
        self._quotas.check_active(caller)

    def require_tokens(self, caller: Caller, tokens: int) -> None:
        """Raises as `enter` does for a quota."""
        self._quotas.check(caller, tokens, self._clock())

    def _require_place(self, caller: Caller) -> None:
        if not self._places.fits(caller, 1):
            raise self._full(self._places, caller, "requests", "max_queued_requests")

    def queue(self, hold: Hold) -> None:
        """Take one of the queue's places. Raises TooManyRequestsError."""
        self._require_place(hold.caller)
        self._places.take(hold.caller, 1)
        hold.queued = True

    def grow(self, hold: Hold, num_bytes: int) -> None:
        """Take up so many bytes more. Raises TooManyRequestsError."""
        if not self._bytes.fits(hold.caller, num_bytes):
            raise self._full(self._bytes, hold.caller, "bytes of prompts", "room for them")
        self._bytes.take(hold.caller, num_bytes)
        hold.num_bytes += num_bytes

    def reserve(self, hold: Hold, tokens: int) -> None:
        """Set aside the most tokens that the request may take. Raises as Quotas.reserve does."""
        self._quotas.reserve(hold.caller, tokens, self._clock())
        hold.tokens = tokens

    def called(self) -> None:
        """A request had its turn."""
        self._called.append(self._clock())

    def stop_waiting(self, hold: Hold) -> None:
        """Give back what is held of the queue; may be called again."""
        if hold.queued:
            self._places.give_back(hold.caller, 1)
        self._bytes.give_back(hold.caller, hold.num_bytes)
        hold.queued, hold.num_bytes = False, 0

    def leave(self, hold: Hold, used_tokens: int) -> None:
        """The request has ended, after so many tokens."""
        self.stop_waiting(hold)
        self._quotas.put_back(hold.caller, hold.tokens - used_tokens, self._clock())
        self._quotas.leave(hold.caller)

    def _full(
        self, space: SharedSpace, caller: Caller, what: str, limit: str
    ) -> TooManyRequestsError:
        retry_s = self._time_to_empty_s()
        return TooManyRequestsError(
            f"queue full: {space.used} {what} wait, {space.held(caller)} of them "
            f"{caller.name}'s, and {limit} is {space.size}; try again in {retry_s:.0f} s",
            retry_s,
        )

    def _time_to_empty_s(self) -> float:
        """At the pace of the last that had their turn."""
        if len(self._called) < 2:
            return MIN_RETRY_S
        pace_s = (self._clock() - self._called[0]) / len(self._called)
        return min(MAX_RETRY_S, max(MIN_RETRY_S, pace_s * self._places.used))
