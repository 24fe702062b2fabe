"""Finding stop strings in text that arrives in pieces.

Knows strings only. Text that may be the beginning of a stop string is held back until it is
clear, so a client never sees part of one.
"""

from collections.abc import Sequence


class StopStrings:
    """Searches one sequence's text for several non-empty strings. The one that is complete
    first wins, so the result does not depend on how the text was cut into pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string was found right after it: one
        that `text` completes. With `may_stop` false none is found, but one may begin."""
        if not self._strings:
            return text, False
        before = len(self._held)
        text = self._held + text
        first = self._first_completed(text, before) if may_stop else None
        if first is not None:
            self._held = ""
            return text[:first], True
        keep = max((_overlap(text, string) for string in self._strings), default=0)
        shown = len(text) - keep
        self._held = text[shown:]
        return text[:shown], False

    def _first_completed(self, text: str, before: int) -> int | None:
        """Where the string begins that is the first to end beyond text[:before]."""
        found = (
            (start + len(string), start)
            for string in self._strings
            if (start := text.find(string, max(0, before - len(string) + 1))) >= 0
        )
        first = min(found, default=None)
        return None if first is None else first[1]

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
