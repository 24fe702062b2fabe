"""uvicorn's HTTP/1.1 connection, with limits on what a client sends before there is a request.

Knows bytes that make nothing yet: of a URL, of headers, of a body's framing and trailers, which
uvicorn and its parser collect without an end; and for how long a request may begin. Knows no
request: a body's own bytes are its route's to limit.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.http.errors import HeadTimeoutError, HeadTooLargeError, NotHttpError, error_response
from moe_core.errors import EpserveError

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 60.0
LINGER_S = 1.0


class BoundedConnection(HttpToolsProtocol):
    """Invariant: the parser has had at most MAX_HEAD_BYTES, and those of one read of the socket,
    since it last told of something: a head, a part of a body or its end."""

    _untold = 0
    _in_head = False
    _refused = False
    _timer: asyncio.TimerHandle | None = None

    def refuse(self, error: EpserveError) -> None:
        """The connection's last answer. A client that still sends as its connection is closed
        sees none, so what it sends is dropped for a while."""
        response = error_response(error)
        head = [b"%b: %b\r\n" % pair for pair in response.raw_headers]
        lines = [STATUS_LINE[response.status_code], *head, b"\r\n", bytes(response.body)]
        self.transport.write(b"".join(lines))
        self._refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._stop_timer()
        self._timer = self.loop.call_later(LINGER_S, self.transport.close)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while data and not (self._refused or self.transport.is_closing()):
            room = MAX_HEAD_BYTES - self._untold
            part, data = data[:room], data[room:]
            self._untold += len(part)
            super().data_received(part)
            if self._untold == MAX_HEAD_BYTES and not self._refused:
                self.refuse(HeadTooLargeError(MAX_HEAD_BYTES))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._untold, self._in_head = 0, False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._untold = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._untold = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what its parser does not take."""
        self.refuse(NotHttpError())

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: the request is answered as if it had not asked for a WebSocket."""

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        """A client that has sent nothing has asked nothing, and one that is being answered has
        until that has ended."""
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_timer()
        elif self._in_head:
            self.refuse(HeadTimeoutError(HEAD_TIMEOUT_S))
        else:
            self.transport.close()
