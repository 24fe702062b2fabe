"""The commands that try a cluster under faults: `epserve chaos` and `epserve bench`.

Knows their options and how texts among them are read. Knows nothing of what is done to whom.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from epserve.options import common, network, security
from epserve.settings_command import SettingsCommand
from moe_core.errors import ConfigError

FAULTS, LOAD = "Faults", "Load"
ALL_FAULTS, WORKERS = "kill,freeze,delay,restart", "attn,expert"
_Name = TypeVar("_Name", bound=StrEnum)

DurationOption = Annotated[float, typer.Option(help="Seconds of faults.", rich_help_panel=FAULTS)]
FaultsOption = Annotated[
    str,
    typer.Option(
        help="What is done to processes: killed, stopped for a while, stopped for moments again "
        "and again, asked to end.",
        rich_help_panel=FAULTS,
    ),
]
RolesOption = Annotated[
    str, typer.Option(help="To whom: attn, expert, gateway.", rich_help_panel=FAULTS)
]
PauseOption = Annotated[
    float, typer.Option(help="Mean seconds between faults.", rich_help_panel=FAULTS)
]
FreezeOption = Annotated[
    float, typer.Option(help="Seconds of the longest freeze.", rich_help_panel=FAULTS)
]
ChaosSeedOption = Annotated[
    int, typer.Option(help="Repeats the requests and the choice of faults.", rich_help_panel=FAULTS)
]
ConcurrencyOption = Annotated[int, typer.Option(help="Requests at a time.", rich_help_panel=LOAD)]
ChaosMaxTokensOption = Annotated[
    int, typer.Option(help="Tokens of the longest request.", rich_help_panel=LOAD)
]
DeadlineOption = Annotated[
    float,
    typer.Option(help="Seconds within which a request must have ended.", rich_help_panel=LOAD),
]

BenchModelOption = Annotated[
    Path | None,
    typer.Option(help="Hugging Face directory. Default: the bundled tiny model."),
]
RowsOption = Annotated[
    str | None, typer.Option(help="Only these, with commas between. Default: all.")
]
RoundsOption = Annotated[int, typer.Option(help="Of each measurement; medians are over them.")]

bench = typer.Typer(name="bench", help="Benchmarks.", no_args_is_help=True)


def chaos(
    target: network.TargetOption = network.DEFAULT_TARGET,
    duration: DurationOption = 60.0,
    faults: FaultsOption = ALL_FAULTS,
    roles: RolesOption = WORKERS,
    pause: PauseOption = 5.0,
    freeze: FreezeOption = 6.0,
    seed: ChaosSeedOption = 0,
    concurrency: ConcurrencyOption = 16,
    max_tokens: ChaosMaxTokensOption = 64,
    deadline: DeadlineOption = 60.0,
    tls_ca: security.TlsCaOption = None,
    tls_cert: security.TlsCertOption = None,
    tls_key: security.TlsKeyOption = None,
    api_key: security.ApiKeyOption = None,
    json: common.JsonOption = False,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Kill and freeze processes under load; check tokens."""
    from epserve.chaos.faults import Fault
    from epserve.chaos.nemesis import NemesisSettings
    from epserve.chaos.run import ChaosSettings
    from epserve.chaos.run import chaos as run_chaos
    from epserve.gateway_connection import Target
    from moe_core.cluster import Role

    nemesis = NemesisSettings(
        _names("faults", faults, Fault), _names("roles", roles, Role), seed, pause, freeze
    )
    settings = ChaosSettings(nemesis, duration, concurrency, max_tokens, deadline)
    gateway = Target.of_options(target, tls_ca, tls_cert, tls_key, api_key)
    run_chaos(gateway, settings, as_json=json)


@bench.callback()
def _bench(debug: common.DebugOption = False) -> None:
    """Benchmarks that start clusters of their own on this machine."""


@bench.command(cls=SettingsCommand)
def faults(
    model: BenchModelOption = None,
    rows: RowsOption = None,
    rounds: RoundsOption = 3,
    json: common.JsonOption = False,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Measure what faults cost, and compare it with the goals."""
    from importlib.resources import as_file, files

    from epserve.bench.faults import bench_faults, rows_named
    from epserve.bench.row import BenchSettings

    with as_file(files("epserve") / "tiny_model") as tiny:
        settings = BenchSettings((model or tiny).absolute(), rounds)
        bench_faults(settings, rows_named(rows), as_json=json)


def _names(option: str, text: str, kind: type[_Name]) -> tuple[_Name, ...]:
    """Names with commas between them, each once, in the order of their kind. Raises ConfigError."""
    given = {part.strip() for part in text.split(",")}
    unknown = sorted(given - {*kind})
    if unknown:
        raise ConfigError(
            option,
            text,
            f"{unknown[0]!r} is none of them; must be names with commas between",
            [",".join(kind)],
        )
    return tuple(name for name in kind if name in given)
