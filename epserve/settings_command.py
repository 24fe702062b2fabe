"""A command whose options may also be set by an EPSERVE_ variable or by a --config file.

The command line comes first, then the variable, then the file, then the default: click's own
order, for which this module only fills in what click looks at (an option's `envvar`, a context's
`default_map`). Knows no option by name, so a new one is a setting as soon as it is declared.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import typer
from typer.core import TyperCommand, TyperOption

from epserve.config_file import ConfigFile, Takes, key_of, read_config_file, shortened
from epserve.environment import check_variables, misread_links, variable_of
from epserve.parent_death import PARENT_PID_VARIABLE
from moe_core.errors import ConfigError

if TYPE_CHECKING:  # typer names these in the signatures that are overridden here
    from typer._click import Command, Context, HelpFormatter, Parameter

OTHER_OPTIONS = "Options"


class SettingsCommand(TyperCommand):
    """Its options are settings, but for those that are `is_eager` or hidden."""

    def __init__(self, name: str | None, **declared: Any) -> None:  # noqa: ANN401  (typer's own)
        super().__init__(name, **declared)
        for option in settings_of(self):
            option.envvar = option.envvar or variable_of(option.name)
            if option.is_flag and not option.secondary_opts:
                # What a variable or a file has switched on can be switched off again.
                option.secondary_opts = [f"--no-{key_of(option.name)}"]

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        if not (ctx.resilient_parsing or {*ctx.help_option_names} & {*args}):
            _check_environment(ctx)
        with _origins_in_errors(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: "Context") -> object:
        if ctx.params.get("dump_config"):
            from epserve.config_dump import effective_config

            typer.echo(effective_config(ctx), nl=False)
            return None
        with _origins_in_errors(ctx):
            return super().invoke(ctx)

    def format_options(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Under the heading that is each option's `rich_help_panel`. Names are never cut: one
        that is too long for its column has a line of its own."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(_heading(parameter), []).append(record)
        sections[OTHER_OPTIONS] = sections.pop(OTHER_OPTIONS, [])  # last
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def settings_of(command: "Command") -> list[TyperOption]:
    """The options that can be set from outside the command line as well."""
    return [option for option in command.params if _is_setting(option)]


def read_settings(context: typer.Context, path: Path) -> None:
    """Have the context's options fall back on a file's settings. Raises ConfigError."""
    takes = {option.name: _takes(option) for option in settings_of(context.command)}
    context.default_map = read_config_file(path, takes, str(context.info_name))


def origin(ctx: "Context", option: TyperOption) -> str | None:
    """Where an option's value came from, in words; None where it is the default."""
    source = ctx.get_parameter_source(option.name)
    match "" if source is None else source.name:
        case "COMMANDLINE":
            return "command line"
        case "ENVIRONMENT":
            return _variable(option)
        case "DEFAULT_MAP":
            assert isinstance(ctx.default_map, ConfigFile)
            return ctx.default_map.place(option.name)
    return None


def _is_setting(parameter: "Parameter") -> TypeGuard[TyperOption]:
    if not isinstance(parameter, TyperOption) or not parameter.expose_value:
        return False
    return not (parameter.is_eager or parameter.hidden)


def _takes(option: TyperOption) -> Takes:
    if option.multiple:
        return Takes.LIST
    return Takes.SWITCH if option.is_bool_flag else Takes.TEXT


def _heading(parameter: "Parameter") -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or OTHER_OPTIONS


def _check_environment(ctx: "Context") -> None:
    """Raises ConfigError for an EPSERVE_ variable that no command reads, and drops those that only
    have the name of one that is read."""
    known = {PARENT_PID_VARIABLE, *_variables(ctx.find_root().command)}
    check_variables(os.environ, known)
    for name in misread_links(os.environ, known):
        value = shortened(os.environ.pop(name))
        typer.echo(
            f"epserve: {name}={value} is left alone: Kubernetes sets it for a Service of that "
            "name (enableServiceLinks: false ends that)",
            err=True,
        )


def _variables(command: "Command") -> Iterator[str]:
    """All that a command, or those below it, read."""
    for option in command.params:
        yield from _envvars(option)
    for child in getattr(command, "commands", {}).values():
        yield from _variables(child)


@contextmanager
def _origins_in_errors(ctx: "Context") -> Iterator[None]:
    """Adds notes to a refusal: who said so, for every setting in it that no argument set."""
    try:
        yield
    except typer.BadParameter as error:
        if isinstance(error.param, TyperOption):
            _note_origin(error, ctx, error.param)
        raise
    except ConfigError as error:
        words = str(error).replace("(", " ").split()
        for option in settings_of(ctx.command):
            if any(word.startswith(f"{option.name}=") for word in words):
                _note_origin(error, ctx, option)
        raise


def _note_origin(error: Exception, ctx: "Context", option: TyperOption) -> None:
    source = ctx.get_parameter_source(option.name)
    if source is None or source.name not in ("ENVIRONMENT", "DEFAULT_MAP"):
        return
    if source.name == "DEFAULT_MAP":
        assert isinstance(ctx.default_map, ConfigFile)
        value = _quoted(option, str(ctx.default_map[option.name]))
        error.add_note(f"{ctx.default_map.place(option.name)}: {key_of(option.name)}={value}")
        return
    variable = _variable(option)
    error.add_note(f"{variable}={_quoted(option, os.environ[variable])}")


def _quoted(option: TyperOption, value: str) -> str:
    return "(not shown)" if option.hide_input else shortened(value)


def _variable(option: TyperOption) -> str:
    """The variable that is set, of those that the option reads."""
    names = _envvars(option)
    return next((name for name in names if os.environ.get(name)), names[0])


def _envvars(option: "Parameter") -> list[str]:
    return [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
