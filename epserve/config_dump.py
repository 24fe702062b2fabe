"""What a command would run with, as YAML that --config reads again.

Knows values and where each came from; knows nothing of what they mean.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from epserve.config_file import key_of
from epserve.settings_command import origin, settings_of

if TYPE_CHECKING:
    from typer._click import Context
    from typer.core import TyperOption

_PLAIN = (bool, int, str)
_DERIVED = re.compile(r"\bDefault(?P<where>[^:.]*): (?P<what>[^.]*)")


def effective_config(ctx: "Context") -> str:
    """One line per setting, each with a comment that says who set it. Where nobody did and the
    default follows from something else it is null, and the comment says what it follows from.

    A secret (`hide_input`) is left out: the line that would hold it is a comment.
    """
    lines = [f"# epserve {ctx.info_name}\n"]
    for option in settings_of(ctx.command):
        source = origin(ctx, option) or _default_words(option, ctx.params[option.name])
        if option.hide_input:
            lines.append(f"# {key_of(option.name)} is not shown  # {source}\n")
            continue
        value = _on_one_line(_as_yaml(ctx.params[option.name]))
        lines.append(f"{key_of(option.name)}: {value}  # {source}\n")
    return "".join(lines)


def _default_words(option: "TyperOption", value: object) -> str:
    """Options say in their help what a default that is no value is derived from."""
    if _as_yaml(value) is not None:
        return "default"
    found = _DERIVED.search(option.help or "")
    return "not set" if found is None else f"default{found['where'] or ''}: {found['what']}"


def _on_one_line(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").rstrip()


def _as_yaml(value: object) -> object:
    """The value as text that its option would take, unless YAML writes it the same way."""
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_as_yaml(item) for item in value] or None
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, float | Path):
        return str(value)
    raise TypeError(f"{value!r} has no text that a command line would take")
