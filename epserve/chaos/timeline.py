"""When tokens came: rates, gaps and stalls of a phase of the load.

Knows times in seconds of one clock, and counts. Knows no request and no fault.
"""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Of durations in seconds; NaN where there was none."""

    p50: float
    p99: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    return Spread(_quantile(ordered, 0.5), _quantile(ordered, 0.99), _quantile(ordered, 1.0))


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else math.nan


class Timeline:
    """Every arrival of tokens of every choice, in the order of time."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.ended = began
        self.num_tokens = 0
        self.first_token_s: list[float] = []
        self._arrivals = array("d")
        self._counts = array("l")
        self._gaps = array("d")  # of each arrival, to the same choice's one before; NaN: the first

    def first(self, at: float, since: float, num_tokens: int) -> None:
        """A choice's first tokens, of a request that was sent at `since`."""
        self.first_token_s.append(at - since)
        self._arrived(at, math.nan, num_tokens)

    def later(self, at: float, before: float, num_tokens: int) -> None:
        """More tokens of a choice that had its last at `before`."""
        self._arrived(at, at - before, num_tokens)

    @property
    def gaps(self) -> list[float]:
        return [gap for gap in self._gaps if not math.isnan(gap)]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_s_between(self.began, self.ended)

    def tokens_per_s_between(self, since: float, until: float) -> float:
        """0 where there is no time in between."""
        if until <= since:
            return 0.0
        return sum(self._counts[self._between(since, until)]) / (until - since)

    def next_after(self, at: float) -> float | None:
        """Seconds from `at` to the next arrival of anything."""
        index = bisect_right(self._arrivals, at)
        return self._arrivals[index] - at if index < len(self._arrivals) else None

    def longest_gap(self, since: float, until: float) -> float:
        """The longest time that a choice had waited for a token which came in between; 0: none
        came."""
        gaps = self._gaps[self._between(since, until)]
        return max((gap for gap in gaps if not math.isnan(gap)), default=0.0)

    def gaps_across(self, at: float) -> list[float]:
        """How long each choice waited that had tokens before `at` and after it."""
        after = slice(bisect_right(self._arrivals, at), None)
        pairs = zip(self._arrivals[after], self._gaps[after], strict=True)
        return [gap for arrival, gap in pairs if arrival - gap <= at]  # false for NaN

    def _between(self, since: float, until: float) -> slice:
        return slice(bisect_left(self._arrivals, since), bisect_left(self._arrivals, until))

    def _arrived(self, at: float, gap: float, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self._arrivals.append(at)
        self._counts.append(num_tokens)
        self._gaps.append(gap)
