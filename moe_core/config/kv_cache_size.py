"""How the size of a KV cache is set: in tokens, in bytes, or as a part of the memory.

Knows the rules between these settings. Knows no model and measures nothing.
"""

import re
from decimal import Decimal

from moe_core.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}


def check_kv_cache_size(
    kv_cache_tokens: int | None, kv_cache_memory: int | None, memory_utilization: float | None
) -> None:
    """At most one may be given. Raises ConfigError."""
    given = {
        name: value
        for name, value in (
            ("kv_cache_tokens", kv_cache_tokens),
            ("kv_cache_memory", kv_cache_memory),
            ("memory_utilization", memory_utilization),
        )
        if value is not None
    }
    if len(given) > 1:
        (first, value), *others = given.items()
        rest = " and ".join(f"{name}={other!r}" for name, other in others)
        raise ConfigError(first, value, f"cannot be combined with {rest}: give only one of them")
    if kv_cache_memory is not None and kv_cache_memory < 1:
        raise ConfigError("kv_cache_memory", kv_cache_memory, "must be at least 1 byte", ("1GiB",))
    if memory_utilization is not None and not 0 < memory_utilization <= 1:
        rule = "must be above 0 and at most 1"
        raise ConfigError("memory_utilization", memory_utilization, rule, (0.9,))


def parse_bytes(text: str) -> int:
    """A number of bytes, as in 1048576, 512MiB, 2GiB or 1.5GB. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        rule = "must be a number of bytes, with KB, MB, GB, TB or KiB, MiB, GiB, TiB if wanted"
        raise ConfigError("kv_cache_memory", text, rule, ("2GiB",))
    return int(Decimal(match[1]) * _UNITS[match[2]])
