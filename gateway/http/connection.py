"""uvicorn's HTTP/1.1 connection, for clients that send a request while another is answered.

Knows uvicorn's connection: it tells only the last request of it that the client has gone, stops
reading, and so seeing that, with the first request that waits, and answers garbage wherever it
comes.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

READ_AHEAD = 1  # requests that may wait before no more is read


class Connection(HttpToolsProtocol):
    """By httptools: h11, which is Python, costs as much for each event as all the rest.

    Invariant: `_unanswered` holds all requests whose answers are not complete, in their order;
    the first is being answered."""

    _unanswered: tuple[RequestResponseCycle, ...] = ()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._unanswered = (*filter(_is_open, self._unanswered), self.cycle)
        if 0 < len(self.pipeline) <= READ_AHEAD:
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for cycle in filter(_is_open, self._unanswered):
            cycle.disconnected = True
            cycle.message_event.set()

    def send_400_response(self, msg: str) -> None:
        """Within an answer it would be read as a part of that."""
        if any(cycle.response_started for cycle in filter(_is_open, self._unanswered)):
            self.transport.close()
        else:
            super().send_400_response(msg)


def _is_open(cycle: RequestResponseCycle) -> bool:
    return not cycle.response_complete
