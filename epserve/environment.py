"""The EPSERVE_ variables of the environment: what each is called, and how to be rid of them.

Knows names only; what a variable's value means is the business of the option behind it.
"""

from collections.abc import Mapping

PREFIX = "EPSERVE_"


def variable_of(option: str) -> str:
    """The variable that sets an option of any command: EPSERVE_DP_SIZE for dp_size."""
    return PREFIX + option.upper()


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that is told all its settings by arguments."""
    return {name: value for name, value in environment.items() if not name.startswith(PREFIX)}
