"""Which addresses may be listened on without TLS.

Knows which hosts only this machine can reach. Binds nothing.
"""

import ipaddress

from moe_core.errors import ConfigError


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
