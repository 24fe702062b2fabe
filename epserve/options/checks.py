"""What an option's value must be, told as it is read from the command line, a variable or a file.

Knows values; knows no option.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import typer

from moe_core.errors import ConfigError
from moe_core.service.addresses import check_advertised, split_address, split_addresses

_Number = TypeVar("_Number", int, float)


def at_least(
    least: int, most: float = math.inf
) -> Callable[[typer.CallbackParam, _Number | None], _Number | None]:
    """A check of an option's value, which is None where the option was not given."""

    def check(parameter: typer.CallbackParam, value: _Number | None) -> _Number | None:
        if value is not None and not least <= value <= most:
            rule = f"must be at least {least}" + (f" and at most {most}" if most < math.inf else "")
            raise ConfigError(str(parameter.name), value, rule, (least if value < least else most,))
        return value

    return check


def seconds(parameter: typer.CallbackParam, value: float) -> float:
    if not 0 <= value < math.inf:
        rule = "must be a number of seconds of at least 0"
        raise ConfigError(str(parameter.name), value, rule, (parameter.default,))
    return value


def one_address(parameter: typer.CallbackParam, value: str) -> str:
    split_address(str(parameter.name), value)
    return value


def several_addresses(parameter: typer.CallbackParam, value: str) -> str:
    split_addresses(str(parameter.name), value)
    return value


def advertised(parameter: typer.CallbackParam, value: str | None) -> str | None:
    if value is not None:
        check_advertised(value)
    return value
