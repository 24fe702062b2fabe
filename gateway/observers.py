"""What the gateway tells of a request to whoever watches it.

Knows the moments of a request's life. Knows neither what is counted nor what is traced: metrics/
and traces.py do. Nothing here may fail a request or wait.
"""

from collections.abc import Sequence as Many
from typing import Protocol

from gateway.requests import Chunk, GenerationRequest, Sequence


class RequestWatch(Protocol):
    """Watches one request; the calls come in this order (`moved` at any time after `admitted`),
    `ended` always and last."""

    @property
    def traceparent(self) -> str:
        """The W3C header that goes with the request to the attention tier, or nothing."""

    def admitted(self, choices: Many[Sequence], dp_rank: int) -> None:
        """Its choices are on their way to a group."""

    def moved(self, dp_rank: int) -> None:
        """Its group is lost or leaves, and the group of this dp_rank goes on with it."""

    def queued(self, seconds: float) -> None:
        """How long one choice has waited for its first step."""

    def put_out(self, chunk: Chunk) -> None:
        """Once per chunk, before the client has it."""

    def ended(self, error: BaseException | None) -> None:
        """`error` is what the client is told instead of an end, or that the client has left."""


class RequestObserver(Protocol):
    def watch(self, request: GenerationRequest) -> RequestWatch:
        """A request has come; whether it will be admitted is open."""


class NoObserver:
    """Watches nothing: an observer and a watch in one."""

    traceparent = ""

    def watch(self, request: GenerationRequest) -> RequestWatch:
        return self

    def admitted(self, choices: Many[Sequence], dp_rank: int) -> None: ...

    def moved(self, dp_rank: int) -> None: ...

    def queued(self, seconds: float) -> None: ...

    def put_out(self, chunk: Chunk) -> None: ...

    def ended(self, error: BaseException | None) -> None: ...


class BothObservers:
    """Tells two observers the same. The second one's traceparent counts."""

    def __init__(self, first: RequestObserver, second: RequestObserver) -> None:
        self._first = first
        self._second = second

    def watch(self, request: GenerationRequest) -> RequestWatch:
        return _BothWatches(self._first.watch(request), self._second.watch(request))


class _BothWatches:
    def __init__(self, first: RequestWatch, second: RequestWatch) -> None:
        self._watches = (first, second)
        self.traceparent = second.traceparent

    def admitted(self, choices: Many[Sequence], dp_rank: int) -> None:
        for each in self._watches:
            each.admitted(choices, dp_rank)

    def moved(self, dp_rank: int) -> None:
        for each in self._watches:
            each.moved(dp_rank)

    def queued(self, seconds: float) -> None:
        for each in self._watches:
            each.queued(seconds)

    def put_out(self, chunk: Chunk) -> None:
        for each in self._watches:
            each.put_out(chunk)

    def ended(self, error: BaseException | None) -> None:
        for each in self._watches:
            each.ended(error)
