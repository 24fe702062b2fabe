"""The options that are about a command as a whole: its settings, its output, its logs."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from epserve.environment import variable_of
from epserve.settings_command import read_settings

LOGGING = "Logging"


@dataclass(slots=True)
class CliState:
    """What the options that every command takes have said."""

    debug: bool = False


def _note_debug(context: typer.Context, debug: bool) -> bool:
    if debug:
        context.ensure_object(CliState).debug = True
    return debug


def _read_config(context: typer.Context, config: Path | None) -> Path | None:
    if config is not None and not context.resilient_parsing:
        read_settings(context, config)
    return config


def _show_version(asked: bool) -> None:
    if asked:
        print(f"epserve {version('epserve')}")
        raise typer.Exit


DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_note_debug, help="Log more; show tracebacks.", rich_help_panel=LOGGING
    ),
]
VersionOption = Annotated[
    bool,
    typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        callback=_read_config,
        envvar=variable_of("config"),
        is_eager=True,
        help="YAML file of settings, named as the long options. What the command line or the "
        "environment sets as well is theirs.",
    ),
]
DumpConfigOption = Annotated[
    bool,
    typer.Option(
        "--dump-config",
        is_eager=True,
        help="Print the settings as YAML for --config, with where each came from; start nothing.",
    ),
]
TracesOption = Annotated[
    str | None,
    typer.Option(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="Send traces to this OTLP gRPC collector, as in http://127.0.0.1:4317.",
        rich_help_panel=LOGGING,
    ),
]
LogJsonOption = Annotated[
    bool,
    typer.Option("--log-json", help="Log one JSON object a line.", rich_help_panel=LOGGING),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
