"""The command line's options, each defined once: flag, type and help.

Knows names and help texts; knows nothing of what a value leads to.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_core.config.kv_cache_size import parse_bytes
from moe_core.errors import ConfigError
from moe_core.service.addresses import split_address

DEFAULT_GRPC_PORT = 50051
DEFAULT_HTTP_PORT = 8000
DEFAULT_TARGET = f"127.0.0.1:{DEFAULT_GRPC_PORT}"
DEFAULT_BLOCK_SIZE = 16
DEFAULT_MAX_NUM_SEQS = 64
MAX_PORT = 65_535


Transport = Literal["auto", "nixl", "grpc"]
Dtype = Literal["auto", "float64", "float32", "bfloat16"]
DeviceKind = Literal["auto", "cpu", "cuda"]
SharedExpertsOn = Literal["attention", "expert"]
Microbatches = Literal["auto", "1", "2", "3"]


@dataclass(slots=True)
class CliState:
    """What the options that every command takes have said."""

    debug: bool = False


def _note_debug(context: typer.Context, debug: bool) -> bool:
    if debug:
        context.ensure_object(CliState).debug = True
    return debug


def _at_least(
    least: int, most: float = math.inf
) -> Callable[[typer.CallbackParam, int | None], int | None]:
    """A check of an option's value, which is None where the option was not given."""

    def check(parameter: typer.CallbackParam, value: int | None) -> int | None:
        if value is not None and not least <= value <= most:
            rule = f"must be at least {least}" + (f" and at most {most}" if most < math.inf else "")
            raise ConfigError(str(parameter.name), value, rule, (least if value < least else most,))
        return value

    return check


def _address(parameter: typer.CallbackParam, value: str) -> str:
    split_address(str(parameter.name), value)
    return value


ModelOption = Annotated[
    Path, typer.Option(help="Hugging Face directory: config.json, *.safetensors, tokenizer.json.")
]
DebugOption = Annotated[
    bool, typer.Option("--debug", callback=_note_debug, help="Log more; show tracebacks.")
]
TransportOption = Annotated[
    Transport, typer.Option(help="How tensors travel between the tiers. auto: nixl, else grpc.")
]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Type of weights and activations. auto: the checkpoint's.")
]
DeviceKindOption = Annotated[
    DeviceKind, typer.Option(help="auto: CUDA where there is a device, else the CPU.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
GrpcPortOption = Annotated[
    int,
    typer.Option(callback=_at_least(0, MAX_PORT), help="The gateway's gRPC port; 0: any free one."),
]
HttpPortOption = Annotated[
    int,
    typer.Option(callback=_at_least(0, MAX_PORT), help="The gateway's HTTP port; 0: any free one."),
]
WorkerPortOption = Annotated[
    int,
    typer.Option(callback=_at_least(0, MAX_PORT), help="This process's own port; 0: any free one."),
]
GatewayOption = Annotated[
    str, typer.Option(callback=_address, help="HOST:PORT of the gateway to register with.")
]
AdvertiseOption = Annotated[
    str | None,
    typer.Option(help="HOST or HOST:PORT where peers reach this process, if not where it listens."),
]
RankOption = Annotated[
    int | None,
    typer.Option(
        callback=_at_least(0),
        help="Rank in its tier; by default the gateway gives the lowest free.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(callback=_at_least(1), help="Threads that one tensor operation may use."),
]
AttnDevicesOption = Annotated[int, typer.Option(help="Processes of the attention tier.")]
DpSizeOption = Annotated[
    int,
    typer.Option(help="Data parallelism of attention; tp = attn devices / dp."),
]
ExpertDevicesOption = Annotated[int, typer.Option(help="Processes of the expert tier.")]
EpSizeOption = Annotated[
    int,
    typer.Option(help="Expert parallelism; expert tp = expert devices / ep."),
]
DegreeOption = Annotated[
    int | None,
    typer.Option(
        help="0: off, 1: broadcast to all, 2: only to who holds a chosen expert. "
        "Default: 0 if ep size is 1, else 1."
    ),
]
EnableMlaOption = Annotated[
    bool | None,
    typer.Option(
        "--enable-mla/--no-enable-mla",
        help="Compressed KV cache, or keys and values per head. Default: as the model.",
    ),
]
RedundantOption = Annotated[int, typer.Option(help="Extra copies of experts per layer.")]
SharedExpertsOption = Annotated[
    SharedExpertsOn, typer.Option(help="Tier that runs the shared expert.")
]
ColocatedOption = Annotated[
    bool,
    typer.Option("--colocated", help="Put attention rank i and expert rank i on device i."),
]
KvCacheTokensOption = Annotated[
    int | None,
    typer.Option(
        callback=_at_least(1),
        help="Tokens that one attention process's KV cache holds. "
        "Default: what --max-num-seqs full contexts need, but at most 65536.",
    ),
]
KvCacheMemoryOption = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes, metavar="BYTES", help="The same in memory per process, as in 2GiB."
    ),
]
MemoryUtilizationOption = Annotated[
    float | None,
    typer.Option(
        help="The same as a part (0 to 1): of a GPU's memory, with all that is in use beside it; "
        "of the memory that a CPU process finds available once its weights are loaded. "
        "What is left is for activations."
    ),
]
BlockSizeOption = Annotated[int, typer.Option(callback=_at_least(1), help="Tokens per KV block.")]
MaxNumSeqsOption = Annotated[
    int, typer.Option(callback=_at_least(1), help="Sequences that one step computes at most.")
]
MicrobatchesOption = Annotated[
    Microbatches,
    typer.Option(
        help="Parts of a step that take turns: one computes attention while others wait for their "
        "experts. auto: 2 for steps of many tokens where each tier has devices of its own, else 1."
    ),
]
TargetOption = Annotated[str, typer.Option(callback=_address, help="HOST:PORT of a gateway.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def token_ids(option: str, text: str | None) -> tuple[int, ...]:
    """Token ids separated by commas; none where the option was not given. Raises ConfigError."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(option, text, "must be token ids separated by commas", ["1,2,3"])
    return tuple(map(int, parts))


def logit_bias(texts: Sequence[str]) -> dict[int, float]:
    """Each as in 15=-2.5: a token id and what is added to its logit. Raises ConfigError."""
    biases: dict[int, float] = {}
    for text in texts:
        token_id, _, bias = text.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise ConfigError(
                "logit_bias", text, "must be a token id, = and a number", ["15=-2.5"]
            ) from None
    return biases
