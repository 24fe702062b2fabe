"""Which host and process this is, in terms that another process can check.

Knows /proc. Knows no transport. Two processes share a host here when they share the kernel's boot,
the network namespace (else an abstract unix socket of one is not the other's) and the pid
namespace (else a pid says nothing); containers on one machine usually do not.
"""

import os
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class HostProcess:
    """One start of one process. `start_ticks` tells a reused pid apart."""

    host_id: str
    pid: int
    start_ticks: int

    @classmethod
    def this(cls) -> "HostProcess":
        pid = os.getpid()
        return cls(_host_id(), pid, start_ticks(pid) or 0)

    def has_exited(self) -> bool:
        """True only if that is certain: for a process of another host it never is."""
        if self.host_id != _host_id() or not self.start_ticks:
            return False
        return start_ticks(self.pid) != self.start_ticks


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks after boot; None when there is no such process.

    A zombie has exited: it has no memory and no threads any more, only a parent that has not yet
    asked for its status.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the command in parentheses, which may itself contain anything.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _host_id() -> str:
    namespaces = (Path(f"/proc/self/ns/{kind}") for kind in ("net", "pid"))
    parts = [str(path.readlink()) if path.is_symlink() else "" for path in namespaces]
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return ":".join([boot, *parts])
