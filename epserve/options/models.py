"""The options that say what is served, and on what: model, types, devices."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from epserve.options.checks import at_least

MODEL = "Model"
Dtype = Literal["auto", "float64", "float32", "bfloat16"]
DeviceKind = Literal["auto", "cpu", "cuda"]

ModelOption = Annotated[
    Path,
    typer.Option(
        help="Hugging Face directory: config.json, *.safetensors, tokenizer.json.",
        rich_help_panel=MODEL,
    ),
]
ModelNameOption = Annotated[
    str | None,
    typer.Option(
        help="What clients call the model. Default: its directory.", rich_help_panel=MODEL
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Type of weights and activations. auto: the checkpoint's.", rich_help_panel=MODEL
    ),
]
DeviceKindOption = Annotated[
    DeviceKind,
    typer.Option(help="auto: CUDA where there is a device, else the CPU.", rich_help_panel=MODEL),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL)
]
LoadNicenessOption = Annotated[
    int,
    typer.Option(
        callback=at_least(0, 19),  # the kernel's range
        help="By how much the start (imports and weights) gives way to other processes.",
        rich_help_panel=MODEL,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        callback=at_least(1),
        help="Threads that one tensor operation may use.",
        rich_help_panel=MODEL,
    ),
]
