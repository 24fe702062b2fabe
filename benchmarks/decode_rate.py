"""Decode tokens per second of a batch of streams, whoever makes them.

Knows when tokens arrive. Knows no engine and no server.
"""

import time
from dataclasses import dataclass, field


@dataclass
class DecodeRate:
    """Counts tokens from the moment when every one of `batch` streams has had its first:
    before it, prefill is still part of the steps."""

    batch: int
    _started: set[object] = field(default_factory=set)
    _since: float = 0.0
    _last: float = 0.0
    _tokens: int = 0

    def arrived(self, stream: object, num_tokens: int) -> None:
        self._last = time.perf_counter()
        if len(self._started) == self.batch:
            self._tokens += num_tokens
        elif num_tokens:
            self._started.add(stream)
            self._since = self._last

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / (self._last - self._since)


def random_prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """Fixed, but no two alike."""
    return [
        [2 + (row * 7919 + column * 104_729) % (vocab_size - 2) for column in range(length)]
        for row in range(batch)
    ]
