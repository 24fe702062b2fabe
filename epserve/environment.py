"""The EPSERVE_ variables of the environment: what each is called, which are none of ours, and how
to be rid of them.

Knows names, and the variables that Kubernetes makes up; what a variable's value means is the
business of the option behind it.
"""

import difflib
import re
from collections.abc import Collection, Mapping

from moe_core.errors import ConfigError

PREFIX = "EPSERVE_"
# In every container of a namespace that has a Service called epserve or epserve-something, unless
# the pod says enableServiceLinks: false. The last, EPSERVE_PORT=tcp://10.0.0.1:80 say, may have the
# name of a setting.
_SERVICE_LINK = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*"
    rf"|{PREFIX}(\w+_)?PORT=(tcp|udp|sctp)://.*",
    re.DOTALL,
)


def variable_of(option: str) -> str:
    """The variable that sets an option of any command: EPSERVE_DP_SIZE for dp_size."""
    return PREFIX + option.upper()


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that is told all its settings by arguments."""
    return {name: value for name, value in environment.items() if not name.startswith(PREFIX)}


def misread_links(environment: Mapping[str, str], known: Collection[str]) -> list[str]:
    """The variables of Kubernetes' that have the name of one of the `known` ones."""
    return [name for name in sorted(environment) if name in known and _is_link(environment, name)]


def check_variables(environment: Mapping[str, str], known: Collection[str]) -> None:
    """Raises ConfigError for a variable that looks like a setting of ours and is none of the
    `known` ones. Its value is not shown: it may be a secret."""
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known and not _is_link(environment, name):
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.8)
            near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            rule = f"no command has such a setting, and names with {PREFIX} are for settings"
            raise ConfigError("environment", name, rule, near)


def _is_link(environment: Mapping[str, str], name: str) -> bool:
    return _SERVICE_LINK.fullmatch(f"{name}={environment[name]}") is not None
