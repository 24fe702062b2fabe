"""The bytes of a stream's events, written by hand: this is the cost of every token.

Knows the frame around a choice and what all choices have; its output is its format's.
"""

from gateway.http.answer import dumps
from gateway.http.usage import UsageCount

HOLE = b"\0"  # in no JSON


def event_choice(
    choice: int,
    output: bytes,
    logprobs: bytes = b"null",
    finish_reason: bytes = b"null",
    more: bytes = b"",
) -> bytes:
    """A choice as JSON. `output` is a member of it, as are those in `more`, each after a comma."""
    return b'{"index":%d,%b,"logprobs":%b,"finish_reason":%b%b}' % (
        choice,
        output,
        logprobs,
        finish_reason,
        more,
    )


class EventFrame:
    """`fields`: what all events of an answer begin with. shows_usage: a "usage" in every event,
    null where it is not told."""

    def __init__(self, fields: dict[str, object], *, shows_usage: bool) -> None:
        self._head = b"data: " + dumps(fields)[:-1] + b',"choices":['
        self._plain_tail = b'],"usage":null}\n\n' if shows_usage else b"]}\n\n"

    def event(self, choice: bytes, usage: UsageCount | None = None) -> bytes:
        """One event with one choice, as JSON; none with b""."""
        if usage is None:
            return self._head + choice + self._plain_tail
        return b'%b%b],"usage":%b}\n\n' % (self._head, choice, dumps(usage.as_json()))

    def around_hole(self, choice: bytes) -> tuple[bytes, bytes]:
        """What comes before and after the HOLE in the event with `choice`."""
        before, _, after = self.event(choice).partition(HOLE)
        return before, after
