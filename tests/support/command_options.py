"""The command line as tests see it: every command, its options, and two values for each."""

from collections.abc import Iterator

import typer.main
from typer.core import TyperCommand, TyperGroup, TyperOption

from epserve import cli
from epserve.settings_command import settings_of


def commands() -> dict[str, TyperCommand]:
    """Every command by the words that call it, as in "serve"."""
    return dict(_leaves(typer.main.get_command(cli.app), ""))


def _leaves(command: object, words: str) -> Iterator[tuple[str, TyperCommand]]:
    if isinstance(command, TyperGroup):
        for name, child in command.commands.items():
            yield from _leaves(child, f"{words} {name}".strip())
    else:
        assert isinstance(command, TyperCommand)
        yield words, command


def configurable() -> dict[str, TyperCommand]:
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


def shown_settings(command: TyperCommand) -> list[TyperOption]:
    """Without secrets, which a dump leaves out."""
    return [option for option in settings_of(command) if not option.hide_input]


def long_name(option: TyperOption) -> str:
    return next(name for name in option.opts if name.startswith("--"))


def arguments(command: TyperCommand, which: int) -> list[str]:
    """Every setting of the command, by its long option, with its first or second value."""
    given: list[str] = []
    for option in shown_settings(command):
        value = two_values(option)[which]
        if option.is_bool_flag:
            given.append(long_name(option) if value == "true" else option.secondary_opts[0])
        else:
            given += [long_name(option), value]
    return given


def environment(command: TyperCommand, which: int) -> dict[str, str]:
    return {
        f"EPSERVE_{option.name.upper()}": two_values(option)[which]
        for option in shown_settings(command)
    }


def config_text(command: TyperCommand, which: int) -> str:
    lines = []
    for option in shown_settings(command):
        value = two_values(option)[which]
        shown = f"[{value!r}]" if option.multiple else repr(value)
        lines.append(f"{long_name(option).removeprefix('--')}: {shown}\n")
    return "".join(lines)
