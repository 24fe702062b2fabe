"""Both ends of a RequestStream, which keep what they are told: its link and its taker."""

from gateway.request_stream import Delta


class Heard:
    """Deltas with their choices' indices, and errors, as they come."""

    def __init__(self) -> None:
        self.all: list[tuple[int, Delta] | Exception] = []

    def take(self, index: int, delta: Delta) -> None:
        self.all.append((index, delta))

    def fail(self, error: Exception) -> None:
        self.all.append(error)


class Link:
    """Says of which sequences it was told that nobody waits for them."""

    def __init__(self, *running: str, hands_over: bool = False) -> None:
        self.running = set(running)
        self.forgotten: list[str] = []
        self.parking: list[str] = []
        self.hands_over = hands_over

    def runs(self, sequence_id: str) -> bool:
        return sequence_id in self.running

    def park(self, sequence_id: str) -> None:
        if sequence_id in self.running:
            self.parking.append(sequence_id)

    def forget(self, sequence_id: str) -> bool:
        was_running = sequence_id in self.running
        self.running.discard(sequence_id)
        if was_running:
            self.forgotten.append(sequence_id)
        return was_running
