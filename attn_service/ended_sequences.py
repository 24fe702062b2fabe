"""Sequences that have ended a short time ago, for a requester that was lost before it could say so.

Knows ids, ends and seconds. Knows no stream: who may take one over is engine_stream.py's to say.
"""

import time
from collections.abc import Callable

from attn_service.sequence import FinishReason, Sequence

End = tuple[Sequence, FinishReason]


class EndedSequences:
    """Keeps each for `keep_s` seconds, and at the longest until one ends after that."""

    def __init__(self, keep_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep_s = keep_s
        self._clock = clock
        self._ends: dict[str, tuple[float, End]] = {}  # in the order of their ends

    def __len__(self) -> int:
        return len(self._ends)

    def put(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence_id = sequence.request.sequence_id
        self.forget(sequence_id)
        if self._keep_s > 0:
            self._ends[sequence_id] = self._clock(), (sequence, reason)
        self._prune()

    def find(self, sequence_id: str) -> End | None:
        self._prune()
        found = self._ends.get(sequence_id)
        return None if found is None else found[1]

    def forget(self, sequence_id: str) -> None:
        """A new one has the id now; without effect where none had it."""
        self._ends.pop(sequence_id, None)

    def _prune(self) -> None:
        oldest = self._clock() - self._keep_s
        while self._ends:
            sequence_id, (ended_at, _) = next(iter(self._ends.items()))
            if ended_at >= oldest:
                return
            del self._ends[sequence_id]
