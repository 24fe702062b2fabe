"""uvicorn's HTTP/1.1 connection, for clients that send a request while another is answered, and for
streams of many small events.

Knows uvicorn's connection: it tells only the last request of it that the client has gone, stops
reading, and so seeing that, with the first request that waits, and answers garbage wherever it
comes; and its `send` is a coroutine, also where it has nothing to wait for.
"""

from functools import partial

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from gateway.http.bounded_connection import BoundedConnection
from gateway.http.event_writer import WriteNow
from moe_core.errors import EpserveError

WRITE_NOW = "write_now"  # in a scope's state
READ_AHEAD = 1  # requests that may wait before no more is read


def write_now_of(scope: Scope) -> WriteNow:
    """For the answer to the request of `scope`; never writes where the server is another one."""
    found: WriteNow = scope.get("state", {}).get(WRITE_NOW, _never)
    return found


class Connection(BoundedConnection):
    """By httptools: h11, which is Python, costs as much for each event as all the rest.

    Invariant: `_unanswered` holds all requests whose answers are not complete, in their order;
    the first is being answered."""

    _unanswered: tuple[RequestResponseCycle, ...] = ()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.scope["state"][WRITE_NOW] = partial(_write_now, self.cycle)
        self._unanswered = (*filter(_is_open, self._unanswered), self.cycle)
        if 0 < len(self.pipeline) <= READ_AHEAD:
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_unanswered()

    def refuse(self, error: EpserveError) -> None:
        """Within an answer it would be read as a part of that."""
        if any(cycle.response_started for cycle in filter(_is_open, self._unanswered)):
            self.transport.close()
        else:
            super().refuse(error)
            self._end_unanswered()

    def _end_unanswered(self) -> None:
        for cycle in filter(_is_open, self._unanswered):
            cycle.disconnected = True
            cycle.message_event.set()


def _is_open(cycle: RequestResponseCycle) -> bool:
    return not cycle.response_complete


def _write_now(cycle: RequestResponseCycle, part: bytes) -> bool:
    """As `cycle.send` writes a part of an answer of unknown length."""
    if cycle.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
    return True


def _never(part: bytes) -> bool:
    return False
