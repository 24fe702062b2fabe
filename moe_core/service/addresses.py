"""host:port strings, and what a process calls itself on its host.

Knows the system's names for hosts and addresses; knows no gRPC.
"""

import os
import re
import socket
import time
from pathlib import Path

from moe_core.errors import ConfigError

WITH_PORT = re.compile(r"(\[[^\]]+\]|[^:]+):\d+")
WILDCARDS = frozenset({"", "0.0.0.0", "::", "[::]"})


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 host."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def split_address(setting: str, address: str) -> tuple[str, int]:
    """Host and port of `address`. Raises ConfigError naming `setting`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(setting, address, "must be HOST:PORT", ["127.0.0.1:50051"])
    return host.strip("[]"), int(port)


def advertised_address(host: str, port: int, advertise: str | None, gateway: str) -> str:
    """Where peers reach a server that listens on host:port.

    `advertise` (HOST or HOST:PORT) if given; else `host`; for a wildcard host the address from
    which this machine reaches the gateway.
    """
    if advertise:
        return advertise if WITH_PORT.fullmatch(advertise) else join_address(advertise, port)
    if host not in WILDCARDS:
        return join_address(host, port)
    return join_address(_own_address_towards(*split_address("gateway", gateway)), port)


def _own_address_towards(host: str, port: int) -> str:
    """Asks the routing table: connecting a datagram socket sends nothing."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            "gateway", f"{host}:{port}", f"cannot be resolved or routed to: {error}"
        ) from None


def host_id() -> str:
    """Equal on two processes that share a kernel, its shared memory and its process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return socket.gethostname()
    namespaces = (os.stat(f"/proc/self/ns/{name}").st_ino for name in ("ipc", "pid"))  # noqa: PTH116
    return "-".join([boot.read_text().strip(), *map(str, namespaces)])


def new_instance_epoch() -> int:
    """Names this start of this process: later starts on the same host get larger numbers."""
    return time.time_ns()
