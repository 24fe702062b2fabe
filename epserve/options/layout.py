"""The options that say how the tiers are cut and where the experts are."""

from typing import Annotated, Literal

import typer

from epserve.options.checks import at_least

PARALLEL = "Parallel layout"
SharedExpertsOn = Literal["attention", "expert"]

RankOption = Annotated[
    int | None,
    typer.Option(
        callback=at_least(0),
        help="Rank in its tier; by default the gateway gives the lowest free.",
        rich_help_panel=PARALLEL,
    ),
]
AttnDevicesOption = Annotated[
    int, typer.Option(help="Processes of the attention tier.", rich_help_panel=PARALLEL)
]
DpSizeOption = Annotated[
    int,
    typer.Option(
        help="Data parallelism of attention; tp = attn devices / dp.", rich_help_panel=PARALLEL
    ),
]
ExpertDevicesOption = Annotated[
    int, typer.Option(help="Processes of the expert tier.", rich_help_panel=PARALLEL)
]
EpSizeOption = Annotated[
    int,
    typer.Option(
        help="Expert parallelism; expert tp = expert devices / ep.", rich_help_panel=PARALLEL
    ),
]
DegreeOption = Annotated[
    int | None,
    typer.Option(
        help="0: off, 1: broadcast to all, 2: only to who holds a chosen expert. "
        "Default: 0 if ep size is 1, else 1.",
        rich_help_panel=PARALLEL,
    ),
]
EnableMlaOption = Annotated[
    bool | None,
    typer.Option(
        "--enable-mla/--no-enable-mla",
        help="Compressed KV cache, or keys and values per head. Default: as the model.",
        rich_help_panel=PARALLEL,
    ),
]
RedundantOption = Annotated[
    int, typer.Option(help="Extra copies of experts per layer.", rich_help_panel=PARALLEL)
]
SpareExpertSlotsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Experts, over all layers, that a process may hold more than either placement asks "
        "for while they move; a move that needs more is refused. Without it: what memory allows.",
        rich_help_panel=PARALLEL,
    ),
]
SharedExpertsOption = Annotated[
    SharedExpertsOn,
    typer.Option(help="Tier that runs the shared expert.", rich_help_panel=PARALLEL),
]
ColocatedOption = Annotated[
    bool,
    typer.Option(
        "--colocated",
        help="Put attention rank i and expert rank i on device i.",
        rich_help_panel=PARALLEL,
    ),
]
RebalanceIntervalOption = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Place experts anew every so many seconds where much is gained; 0: only when asked "
        "(epserve rebalance).",
        rich_help_panel=PARALLEL,
    ),
]
