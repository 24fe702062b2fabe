"""host:port strings, and what a process calls itself on its host.

Knows the system's names for hosts and addresses; knows no gRPC.
"""

import ipaddress
import os
import re
import socket
import time
from pathlib import Path

from moe_core.errors import ConfigError

WITH_PORT = re.compile(r"(\[[^\]]+\]|[^:]+):\d+")
HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
WILDCARDS = frozenset({"", "0.0.0.0", "::", "[::]"})


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 host."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def split_address(setting: str, address: str) -> tuple[str, int]:
    """Host and port of `address`. Raises ConfigError naming `setting`."""
    if "://" in address:
        rule = "is a URL; must be HOST:PORT, of a port that answers gRPC"
        raise ConfigError(setting, address, rule, ["127.0.0.1:50051"])
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(setting, address, "must be HOST:PORT", ["127.0.0.1:50051"])
    return host.strip("[]"), int(port)


def split_addresses(setting: str, addresses: str) -> list[tuple[str, int]]:
    """Host and port of each of `addresses`, which have commas between them. Raises ConfigError
    naming `setting`."""
    return [split_address(setting, address) for address in addresses.split(",")]


def advertised_address(host: str, port: int, advertise: str | None, gateway: str) -> str:
    """Where peers reach a server that listens on host:port.

    `advertise` (HOST or HOST:PORT) if given; else `host`; for a wildcard host the address from
    which this machine reaches the (first) gateway.
    """
    if advertise:
        check_advertised(advertise)
        return advertise if WITH_PORT.fullmatch(advertise) else join_address(advertise, port)
    if host not in WILDCARDS:
        return join_address(host, port)
    return join_address(_own_address_towards(*split_addresses("gateway", gateway)[0]), port)


def check_advertised(advertise: str) -> None:
    """Raises ConfigError unless peers could use `advertise`, HOST or HOST:PORT."""
    given_port = WITH_PORT.fullmatch(advertise) is not None
    address = advertise if given_port else join_address(advertise, 1)
    host, _ = split_address("advertise_address", address)
    if host in WILDCARDS:
        rule = "is an address to listen on, not one to reach"
    elif not _is_host(host):
        rule = "must be a host name, an IPv4 address, or an IPv6 address (in brackets with a port)"
    else:
        return
    raise ConfigError("advertise_address", advertise, rule, ("10.1.2.3", "10.1.2.3:50060"))


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return HOST_NAME.fullmatch(host) is not None
    return True


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


def bound_socket(host: str, port: int) -> socket.socket:
    """A TCP socket bound to host:port (0: any free one), not listening yet. Raises OSError, of
    which socket.gaierror says that `host` is no address."""
    found = socket.getaddrinfo(
        host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, protocol, _, where = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
    except OSError:
        bound.close()
        raise
    return bound
