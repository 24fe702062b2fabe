"""How often each distinct token occurs in one sequence, kept up to date token by token.

Knows token ids only, and nothing of what is done with the counts. A step needs them as arrays,
so they are kept as arrays: what a step costs depends on the distinct tokens, never on the
vocabulary.
"""

from array import array
from collections.abc import Iterable


class TokenCounts:
    """`ids` [k] int64, distinct, and beside each in `counts` [k] int64 how often it was
    generated: 0 for a token of the prompt only."""

    def __init__(self, prompt_ids: Iterable[int], output_ids: Iterable[int] = ()) -> None:
        self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(prompt_ids))}
        self.ids = array("q", self._slots)
        self.counts = array("q", bytes(self.ids.itemsize * len(self.ids)))
        for token_id in output_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Count one more generated token."""
        slot = self._slots.setdefault(token_id, len(self.ids))
        if slot == len(self.ids):
            self.ids.append(token_id)
            self.counts.append(0)
        self.counts[slot] += 1
