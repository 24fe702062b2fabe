"""The bytes of a stream's events, written by hand: this is the cost of every token.

Knows the frame around a choice; what is in the choice is its format's.
"""

from gateway.http.answer import dumps
from gateway.http.usage import UsageCount


class EventFrame:
    """`fields`: what all events of an answer begin with. shows_usage: a "usage" in every event,
    null where it is not told."""

    def __init__(self, fields: dict[str, object], *, shows_usage: bool) -> None:
        self._head = b"data: " + dumps(fields)[:-1] + b',"choices":['
        self._plain_tail = b'],"usage":null}\n\n' if shows_usage else b"]}\n\n"

    def around(self, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        """An event without usage, but for what is between `before` and `after` of its choice."""
        return self._head + before, after + self._plain_tail

    def event(self, choice: bytes, usage: UsageCount | None = None) -> bytes:
        """One event with one choice, as JSON; none with b""."""
        if usage is None:
            return self._head + choice + self._plain_tail
        return b'%b%b],"usage":%b}\n\n' % (self._head, choice, dumps(usage.as_json()))
