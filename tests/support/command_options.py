"""The command line as tests see it: every command, its options, and two values for each."""

import typer.main
from typer.core import TyperGroup, TyperOption

from epserve import cli
from epserve.settings_command import SettingsCommand, settings_of


def commands() -> dict[str, SettingsCommand]:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    return dict(group.commands)


def configurable() -> dict[str, SettingsCommand]:
    """The commands that take --config."""
    return {
        name: command
        for name, command in commands().items()
        if any(parameter.name == "config" for parameter in command.params)
    }


def two_values(option: TyperOption) -> tuple[str, str]:
    """Two different values that the option takes, as text."""
    descriptor = option.type_descriptor
    if descriptor.choices is not None:
        return str(descriptor.choices[0]), str(descriptor.choices[1])
    if option.is_bool_flag:
        return "true", "false"
    if descriptor.annotation is float:
        return "0.25", "0.5"
    if descriptor.annotation is int:
        return "3", "5"
    return "first:1", "second:2"  # also where it must be HOST:PORT


def long_name(option: TyperOption) -> str:
    return next(name for name in option.opts if name.startswith("--"))


def arguments(command: SettingsCommand, which: int) -> list[str]:
    """Every setting of the command, by its long option, with its first or second value."""
    given: list[str] = []
    for option in settings_of(command):
        value = two_values(option)[which]
        if option.is_bool_flag:
            given.append(long_name(option) if value == "true" else option.secondary_opts[0])
        else:
            given += [long_name(option), value]
    return given


def environment(command: SettingsCommand, which: int) -> dict[str, str]:
    return {
        f"EPSERVE_{option.name.upper()}": two_values(option)[which]
        for option in settings_of(command)
    }


def config_text(command: SettingsCommand, which: int) -> str:
    lines = []
    for option in settings_of(command):
        value = two_values(option)[which]
        shown = f"[{value!r}]" if option.multiple else repr(value)
        lines.append(f"{long_name(option).removeprefix('--')}: {shown}\n")
    return "".join(lines)
