"""How much of each DP group this gateway's requests take up, and who still fits.

Knows what was sent to a group and what has come back. Knows no queue and no caller.

A group that is given more than it can run queues it itself, first come first served, and whose turn
it is would no longer be for the gateway to say. So a group is given little more than it can run: a
few sequences beyond those of a step, to have the next at hand, and prompts only as far as its KV
pool holds them beside what runs. The group's own reports come too seldom for that; first tokens and
ends come at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.groups import Group, GroupKey

SPARE_SHARE = 8  # one sequence beyond a step's for each so many of a step's


@dataclass(slots=True)
class _Taken:
    """Of one group. Tokens are those of requests that have begun; prompts those of the others."""

    sequences: int = 0
    tokens: int = 0
    prompts: int = 0


class Seat:
    """One request's part of a group, from when it is sent until it has ended."""

    def __init__(self, taken: _Taken, sequences: int, prompt_tokens: int) -> None:
        self._taken = taken
        self._sequences = sequences
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        self.begun = False
        taken.sequences += sequences
        taken.prompts += prompt_tokens

    def received(self, num_tokens: int, cached_tokens: int) -> None:
        """Tokens came. Those of the prompt that were cached take up nothing of their own."""
        if not self.begun:
            self.begun = True
            self._taken.prompts -= self._prompt_tokens
            num_tokens += max(0, self._prompt_tokens - cached_tokens)
        self._tokens += num_tokens
        self._taken.tokens += num_tokens

    def ended(self) -> None:
        """One of the request's sequences has ended."""
        self._sequences -= 1
        self._taken.sequences -= 1

    def leave(self) -> None:
        """The request has ended, with all its sequences; called once."""
        self._taken.sequences -= self._sequences
        self._taken.tokens -= self._tokens
        if not self.begun:
            self._taken.prompts -= self._prompt_tokens


class GroupRoom:
    def __init__(self) -> None:
        self._taken: dict[GroupKey, _Taken] = {}

    def fits(self, group: Group, sequences: int, prompt_tokens: int) -> bool:
        """Whether `group` should be given a request now. One always fits where nothing runs, and
        where nothing waits for its first token its prompt need not fit: so all get their turn."""
        taken = self._of(group)
        if taken.sequences == 0:
            return True
        if taken.sequences + sequences > _seats(group):
            return False
        waiting = taken.prompts
        return waiting == 0 or waiting + prompt_tokens <= group.kv_tokens - taken.tokens

    def free_seats(self, groups: Iterable[Group]) -> int:
        """Sequences that all of `groups` could be given now, if their prompts fit."""
        return sum(max(0, _seats(group) - self._of(group).sequences) for group in groups)

    def take(self, group: Group, sequences: int, prompt_tokens: int) -> Seat:
        self._forget_empty()
        taken = self._taken.setdefault(group.key, _Taken())
        return Seat(taken, sequences, prompt_tokens)

    def _of(self, group: Group) -> _Taken:
        return self._taken.get(group.key) or _Taken()

    def _forget_empty(self) -> None:
        """Processes come and go; only those that hold something are remembered."""
        for key in [key for key, taken in self._taken.items() if taken.sequences == 0]:
            del self._taken[key]


def _seats(group: Group) -> int:
    most = group.load.max_num_seqs
    return most + -(-most // SPARE_SHARE)
