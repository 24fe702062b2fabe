"""Which addresses may be listened on without TLS, and which ports together.

Knows which hosts only this machine can reach, and how the libraries that listen by themselves are
told. Binds nothing.
"""

import ipaddress
import os
from collections.abc import Mapping

from moe_core.errors import ConfigError

LOOPBACK_DEVICE = "lo"


def is_loopback(host: str) -> bool:
    """127.0.0.0/8, ::1 and localhost. Any other name is not, whatever it resolves to today."""
    bare = host.strip("[]")
    if bare.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def require_safe_bind(setting: str, host: str, tls: object | None, insecure: bool) -> None:
    """Raises ConfigError naming `setting` where others than this machine could reach `host` and
    nothing (`tls` None) would tell them apart, unless the user has said that this is so."""
    if tls is not None or insecure or is_loopback(host):
        return
    rule = (
        "other machines reach this address, and without TLS anybody there may use the cluster; "
        "give --tls-cert, --tls-key and --tls-ca (epserve certs DIR makes them), or say --insecure"
    )
    raise ConfigError(setting, host, rule, ("127.0.0.1",))


def require_own_ports(ports: Mapping[str, int]) -> None:
    """Raises ConfigError where two of a process's settings name the same port; 0 is any free one,
    and so never the same."""
    taken: dict[int, str] = {}
    for setting, port in ports.items():
        other = taken.setdefault(port, setting)
        if port and other != setting:
            rule = f"{other} is {port} as well, and each needs a port of its own"
            raise ConfigError(setting, port, rule, ("0 (any free one)",))


def keep_libraries_on(host: str) -> None:
    """UCX (under NIXL) and gloo open ports of their own, by default on the machine's network
    devices. A process that listens on loopback keeps them there, unless the user has said where.
    Call it before they start: they read the environment then."""
    if is_loopback(host):
        os.environ.setdefault("UCX_NET_DEVICES", LOOPBACK_DEVICE)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_DEVICE)
