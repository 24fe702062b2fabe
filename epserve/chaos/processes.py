"""The processes of a cluster on this machine, and the only ones that may be signalled.

Knows pids, command lines and signals. A process is held by a pidfd from before it is checked, so
that what is signalled is what was checked, even when its pid has been given to another since.
"""

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from epserve.status import member_name
from moe_core.cluster import Member
from moe_core.errors import ConfigError, UnavailableError
from moe_core.service.addresses import host_id
from moe_core.transport.host import start_ticks

CLOCK_SLACK_S = 5.0  # a process names its start by the clock of the wall, which may be set


class NotThereError(UnavailableError):
    """A member's process has ended, or its pid is another process's now."""


def require_local(members: Iterable[Member]) -> None:
    """Raises ConfigError, naming the first member that is not a process of this machine."""
    if not hasattr(os, "pidfd_open"):
        raise ConfigError("target", "…", "chaos needs Linux: it signals processes by pidfd")
    here = host_id()
    for member in members:
        if member.host_id != here:
            raise ConfigError(
                "target",
                f"{member_name(member)} at {member.address}",
                "is not a process of this machine (or of this container), so it cannot be "
                "signalled from here; run chaos where all members run, or leave its role out",
            )


class LocalProcess:
    """Context manager. Raises NotThereError when built of a member whose process is not there."""

    def __init__(self, member: Member) -> None:
        self.name = member_name(member)
        self.pid = member.pid
        try:
            self._pidfd = os.pidfd_open(member.pid)
        except ProcessLookupError:
            raise NotThereError(f"{self.name} (pid {self.pid}) has ended") from None
        try:
            self._require_member(member)
        except BaseException:
            os.close(self._pidfd)
            raise

    def __enter__(self) -> "LocalProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._pidfd)

    def send(self, number: signal.Signals) -> None:
        """Raises NotThereError when it has ended, UnavailableError when that is not ours to do."""
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            raise NotThereError(f"{self.name} (pid {self.pid}) has ended") from None
        except PermissionError:
            raise UnavailableError(
                f"{self.name} (pid {self.pid}): this user may not send it {number.name}"
            ) from None

    def _require_member(self, member: Member) -> None:
        words = _command_line(member.pid)
        names = [Path(word).name for word in words]
        if "epserve" not in names or member.role.value not in words[names.index("epserve") :]:
            what = f"runs {' '.join(words)!r}" if words else "has ended"
            raise NotThereError(
                f"{self.name}: pid {member.pid} {what}, not epserve {member.role}; left alone"
            )
        started = _started_at(member.pid)
        if started is None or started > member.instance_epoch / 1e9 + CLOCK_SLACK_S:
            raise NotThereError(
                f"{self.name}: pid {member.pid} was started after the member joined; left alone"
            )


def _command_line(pid: int) -> list[str]:
    """Empty where the process has ended."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in text.split(b"\0") if word]


def _started_at(pid: int) -> float | None:
    """Seconds since the epoch; None where the process has ended."""
    ticks = start_ticks(pid)
    if ticks is None:
        return None
    up_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - (up_s - ticks / os.sysconf("SC_CLK_TCK"))
