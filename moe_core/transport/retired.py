"""Memory that must outlive its link, because somebody may still write to it or read from it.

Knows sizes, processes and what to call to release something. Knows no agent.

Invariant: what is retired is released only after the process that may touch it has provably
exited. A write that was posted and not polled to its end lands whatever its writer was told (a
frozen peer's, hours later), so no timeout makes the memory safe to use again.
"""

import atexit
from collections.abc import Callable
from dataclasses import dataclass

from moe_core.errors import TransportError
from moe_core.transport.host import HostProcess


@dataclass(frozen=True, slots=True)
class _Retired:
    num_bytes: int
    peer: str
    process: HostProcess
    release: Callable[[], None]


class RetiredMemory:
    """All retired memory of one agent, and the budget for it, in bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._entries: list[_Retired] = []

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries)

    def add(
        self, num_bytes: int, peer: str, process: HostProcess, release: Callable[[], None]
    ) -> None:
        """`release` holds on to the memory, and is called once it is safe to let go of it."""
        self._entries.append(_Retired(num_bytes, peer, process, release))

    def sweep(self) -> None:
        """Release what exited processes can no longer touch."""
        done = [entry for entry in self._entries if entry.process.has_exited()]
        self._entries = [entry for entry in self._entries if entry not in done]
        for entry in done:
            entry.release()

    def admit(self, num_bytes: int, peer: str) -> None:
        """Raises TransportError naming `peer` when a link of this size might overrun the budget,
        should its memory have to be retired as well."""
        self.sweep()
        held = self.num_bytes
        if held and held + num_bytes > self._budget:
            whose = ", ".join(sorted({entry.peer for entry in self._entries}))
            raise TransportError(
                f"{peer} is refused: {held} bytes are held back for peers that may still write "
                f"them ({whose}), {num_bytes} more would exceed retired_bytes={self._budget}; "
                "end those processes, or restart this one"
            )

    def close(self) -> None:
        """What cannot be released by now stays until this process ends."""
        self.sweep()
        if self._entries:
            atexit.register(self.sweep)
