"""How long attention waits for experts, and when it asks others: defaults, and what is refused.

Knows two settings in seconds. Knows nothing of who waits.
"""

from moe_core.errors import ConfigError

DEFAULT_EXPERT_WAIT_S = 30.0


def check_expert_wait(expert_wait_s: float, hedge_after_s: float | None) -> None:
    """Raises ConfigError."""
    if expert_wait_s <= 0:
        nearest = (DEFAULT_EXPERT_WAIT_S,)
        raise ConfigError("expert_wait", expert_wait_s, "must be above 0 seconds", nearest)
    if hedge_after_s is not None and not 0 < hedge_after_s <= expert_wait_s:
        rule = f"must be above 0 and at most expert_wait={expert_wait_s:g} seconds"
        raise ConfigError("hedge_after", hedge_after_s, rule, (expert_wait_s / 2,))
