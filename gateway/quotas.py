"""What each caller may use: requests at a time, and tokens a minute.

Knows the limits of gateway/callers.py and what is in use. Knows no queue and no clock: the time, in
seconds of any steady clock, is an argument.

A request sets aside its prompt and the most that it may generate from a bucket that holds one
minute's tokens and fills up steadily; what it did not use is put back when it ends. So no caller is
ever served more than its limit, whatever happens to its requests.
"""

from dataclasses import dataclass

from gateway.callers import Caller
from moe_core.errors import RequestError, TooManyRequestsError

CONCURRENCY_RETRY_S = 1.0


@dataclass(slots=True)
class _Bucket:
    """`level` tokens were there at `since`; never more than `size`, never below zero."""

    size: int
    level: float
    since: float

    def fill(self, now: float, size: int) -> None:
        gained = max(0.0, now - self.since) * size / 60
        self.level = min(float(size), self.level + gained)
        self.size, self.since = size, now


class Quotas:
    def __init__(self) -> None:
        self._active: dict[str, int] = {}
        self._buckets: dict[str, _Bucket] = {}

    def active(self, caller: Caller) -> int:
        """Its requests that are under way."""
        return self._active.get(caller.name, 0)

    def enter(self, caller: Caller) -> None:
        """Count one more request. Raises as `check_active` does."""
        self.check_active(caller)
        self._active[caller.name] = self.active(caller) + 1

    def check_active(self, caller: Caller) -> None:
        """Raises TooManyRequestsError where the caller has all that it may have at a time."""
        active, most = self.active(caller), caller.max_concurrent_requests
        if most is not None and active >= most:
            raise TooManyRequestsError(
                f"{caller.name}: {active} requests are under way, and max_concurrent_requests is "
                f"{most}; send more when one has ended",
                CONCURRENCY_RETRY_S,
            )

    def leave(self, caller: Caller) -> None:
        """One of the requests that entered has ended."""
        left = self._active.pop(caller.name) - 1
        if left:
            self._active[caller.name] = left

    def check(self, caller: Caller, tokens: int, now: float) -> None:
        """Raises as `reserve` does, and sets nothing aside."""
        size = caller.max_tokens_per_minute
        if size is None:
            return
        if tokens > size:
            raise RequestError(
                f"max_tokens: prompt and output may make {tokens} tokens, more than "
                f"{caller.name}'s max_tokens_per_minute={size}; lower max_tokens or shorten the "
                "prompt"
            )
        level = self._filled(caller, size, now).level
        if tokens > level:
            wait_s = (tokens - level) * 60 / size
            raise TooManyRequestsError(
                f"{caller.name}: {int(level)} tokens are left of max_tokens_per_minute={size}, and "
                f"this request may take {tokens}; there is room in {wait_s:.1f} s",
                wait_s,
            )

    def reserve(self, caller: Caller, tokens: int, now: float) -> None:
        """Set aside `tokens`. Raises TooManyRequestsError with the time until they are there, or
        RequestError where they never will be."""
        self.check(caller, tokens, now)
        if caller.max_tokens_per_minute is not None:
            self._buckets[caller.name].level -= tokens

    def put_back(self, caller: Caller, tokens: int, now: float) -> None:
        """Of what was set aside, what was not used."""
        size = caller.max_tokens_per_minute
        if size is not None and tokens > 0:
            bucket = self._filled(caller, size, now)
            bucket.level = min(float(size), bucket.level + tokens)

    def _filled(self, caller: Caller, size: int, now: float) -> _Bucket:
        bucket = self._buckets.setdefault(caller.name, _Bucket(size, float(size), now))
        bucket.fill(now, size)
        return bucket
