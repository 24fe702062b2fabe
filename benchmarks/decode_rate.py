"""Decode tokens per second of a batch of streams, whoever makes them.

Knows when tokens arrive. Knows no engine and no server.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class DecodeRate:
    """Of the steps in which each of `batch` streams gets a token: from the one that gives the last
    stream its first, since before it prefill is part of the steps, to the one with which the first
    stream ends. The stream that ends first counts those steps."""

    batch: int
    _arrivals: dict[object, list[tuple[float, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def arrived(self, stream: object, num_tokens: int) -> None:
        if num_tokens:
            self._arrivals[stream].append((time.perf_counter(), num_tokens))

    @property
    def tokens_per_s(self) -> float:
        began = max(arrivals[0][0] for arrivals in self._arrivals.values())
        first_to_end = min(self._arrivals.values(), key=lambda arrivals: arrivals[-1][0])
        since = min((at for at, _ in first_to_end), key=lambda at: abs(at - began))
        tokens = sum(num_tokens for at, num_tokens in first_to_end if at > since)
        return self.batch * tokens / (first_to_end[-1][0] - since)


def random_prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """Fixed, but no two alike."""
    return [
        [2 + (row * 7919 + column * 104_729) % (vocab_size - 2) for column in range(length)]
        for row in range(batch)
    ]
