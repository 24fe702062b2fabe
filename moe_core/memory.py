"""How much memory a process may still take on its device.

Knows what CUDA, /proc/meminfo and memory control groups (version 1 and 2) say. Knows nothing of
what the memory is for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """What a version of control groups calls its limit, its use, and the part of the use that is
    page cache and given up when memory is short."""

    limit: str
    used: str
    reclaimable: str


_VERSION_1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _GroupFiles("memory.max", "memory.current", "inactive_file")


def memory_budget(device: torch.device, fraction: float) -> int:
    """Bytes that may be taken on `device`, less than 0 where there are too many in use already.

    CUDA: `fraction` of the device's memory, less what anybody uses of it now. CPU: `fraction` of
    `available_memory`.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself would count as used
        free, total = torch.cuda.mem_get_info(device)
        return int(fraction * total) - (total - free)
    return int(fraction * available_memory())


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that this process can take without swapping: what the machine has, or what is left
    below a limit of one of its control groups. `root` holds proc/ and sys/."""
    available = _value(root / "proc/meminfo", "MemAvailable:") * 1024
    return min([available, *_group_rooms(root)])


def _group_rooms(root: Path) -> Iterator[int]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _rooms_upwards(root / "sys/fs/cgroup", path, _VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _rooms_upwards(root / "sys/fs/cgroup/memory", path, _VERSION_1)


def _rooms_upwards(mount: Path, path: str, files: _GroupFiles) -> Iterator[int]:
    """What is left in the group at `path` and in each above it. Those that a container does not
    see are left out: it sees its own as the mount's root."""
    group = mount / path.lstrip("/")
    for directory in (group, *group.parents):
        if not directory.is_relative_to(mount):
            return
        limit = directory / files.limit
        if limit.is_file() and (text := limit.read_text().strip()) != "max":
            used = int((directory / files.used).read_text())
            yield int(text) - used + _value(directory / "memory.stat", files.reclaimable)


def _value(path: Path, name: str) -> int:
    """The number behind `name` in a file of such lines. Raises ValueError where there is none."""
    for line in path.read_text().splitlines():
        if (words := line.split())[:1] == [name]:
            return int(words[1])
    raise ValueError(f"{path} has no {name}")
