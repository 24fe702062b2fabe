"""A Taker that keeps what it is told of a request."""

from gateway.request_stream import Delta


class Heard:
    """Deltas with their choices' indices, and errors, as they come."""

    def __init__(self) -> None:
        self.all: list[tuple[int, Delta] | Exception] = []

    def take(self, index: int, delta: Delta) -> None:
        self.all.append((index, delta))

    def fail(self, error: Exception) -> None:
        self.all.append(error)
