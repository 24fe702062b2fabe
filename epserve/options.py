"""The command line's options, each defined once: flag, type, help and the heading it stands under.

Knows names and help texts; knows nothing of what a value leads to. Every option is also an
EPSERVE_ variable and a key of a --config file, without doing anything for it: see
epserve.settings_command. Those that are `is_eager` are not: they are about the others. A secret has
`hide_input`: it is not shown again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from epserve.environment import variable_of
from epserve.settings_command import read_settings
from moe_core.config.kv_cache_size import parse_bytes
from moe_core.errors import ConfigError
from moe_core.service.addresses import check_advertised, split_address, split_addresses
from moe_core.service.tls_files import TlsFiles

DEFAULT_GRPC_PORT = 50051
DEFAULT_CLUSTER_PORT = 50052
DEFAULT_HTTP_PORT = 8000
DEFAULT_TARGET = f"127.0.0.1:{DEFAULT_GRPC_PORT}"
DEFAULT_REGISTRY = "embedded"
DEFAULT_BLOCK_SIZE = 16
DEFAULT_MAX_NUM_SEQS = 64
DEFAULT_MAX_QUEUED_REQUESTS = 1024
DEFAULT_ATTN_WAIT_S = 30.0
DEFAULT_ORPHAN_GRACE_S = 5.0
DEFAULT_DRAIN_TIMEOUT = 30.0
MAX_DRAIN_TIMEOUT = 86_400
MAX_PORT = 65_535
# Set by serve for the gateway that it starts, so that it can watch it: a digest, not a key.
LAUNCHER_KEY_HASH = "EPSERVE_LAUNCHER_KEY_HASH"

MODEL, PARALLEL, CACHE = "Model", "Parallel layout", "Cache and scheduling"
NETWORK, SECURITY, LOGGING = "Network", "Security", "Logging"

Transport = Literal["auto", "nixl", "grpc"]
Dtype = Literal["auto", "float64", "float32", "bfloat16"]
DeviceKind = Literal["auto", "cpu", "cuda"]
SharedExpertsOn = Literal["attention", "expert"]
Microbatches = Literal["auto", "1", "2", "3"]
_Number = TypeVar("_Number", int, float)


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


def _at_least(
    least: int, most: float = math.inf
) -> Callable[[typer.CallbackParam, _Number | None], _Number | None]:
    """A check of an option's value, which is None where the option was not given."""

    def check(parameter: typer.CallbackParam, value: _Number | None) -> _Number | None:
        if value is not None and not least <= value <= most:
            rule = f"must be at least {least}" + (f" and at most {most}" if most < math.inf else "")
            raise ConfigError(str(parameter.name), value, rule, (least if value < least else most,))
        return value

    return check


def _seconds(parameter: typer.CallbackParam, value: float) -> float:
    if not 0 <= value < math.inf:
        rule = "must be a number of seconds of at least 0"
        raise ConfigError(str(parameter.name), value, rule, (parameter.default,))
    return value


def _address(parameter: typer.CallbackParam, value: str) -> str:
    split_address(str(parameter.name), value)
    return value


def _addresses(parameter: typer.CallbackParam, value: str) -> str:
    split_addresses(str(parameter.name), value)
    return value


def _advertised(parameter: typer.CallbackParam, value: str | None) -> str | None:
    if value is not None:
        check_advertised(value)
    return value


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
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_note_debug, help="Log more; show tracebacks.", rich_help_panel=LOGGING
    ),
]
TransportOption = Annotated[
    Transport,
    typer.Option(
        help="How tensors travel between the tiers. auto: nixl, else grpc.", rich_help_panel=NETWORK
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
HostOption = Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=NETWORK)]
GrpcPortOption = Annotated[
    int,
    typer.Option(
        callback=_at_least(0, MAX_PORT),
        help="The gateway's gRPC port; 0: any free one.",
        rich_help_panel=NETWORK,
    ),
]
HttpPortOption = Annotated[
    int,
    typer.Option(
        callback=_at_least(0, MAX_PORT),
        help="The gateway's HTTP port; 0: any free one.",
        rich_help_panel=NETWORK,
    ),
]
WorkerPortOption = Annotated[
    int,
    typer.Option(
        callback=_at_least(0, MAX_PORT),
        help="This process's own port; 0: any free one.",
        rich_help_panel=NETWORK,
    ),
]
GatewayOption = Annotated[
    str,
    typer.Option(
        callback=_addresses,
        help="HOST:PORT of the gateway to register with; of all gateways that share a registry, "
        "with commas between them.",
        rich_help_panel=NETWORK,
    ),
]
RegistryOption = Annotated[
    str,
    typer.Option(
        help="Where gateways of one cluster find each other: embedded (there is one gateway), or "
        "etcd://HOST:PORT[,HOST:PORT…][/NAME], NAME being the cluster's.",
        rich_help_panel=NETWORK,
    ),
]
AdvertiseOption = Annotated[
    str | None,
    typer.Option(
        callback=_advertised,
        help="HOST or HOST:PORT where peers reach this process, if not where it listens.",
        rich_help_panel=NETWORK,
    ),
]
TlsCertOption = Annotated[
    Path | None,
    typer.Option(
        help="PEM certificate that names this process's role; see epserve certs.",
        rich_help_panel=SECURITY,
    ),
]
TlsKeyOption = Annotated[
    Path | None, typer.Option(help="PEM private key of --tls-cert.", rich_help_panel=SECURITY)
]
TlsCaOption = Annotated[
    Path | None,
    typer.Option(
        help="PEM certificate of the CA that signs whom to believe.", rich_help_panel=SECURITY
    ),
]
InsecureOption = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Listen beyond this machine without TLS, open to anybody.",
        rich_help_panel=SECURITY,
    ),
]
ClusterPortOption = Annotated[
    int,
    typer.Option(
        callback=_at_least(0, MAX_PORT),
        help="With TLS, the gateway's port for attn and expert; --grpc-port is for clients then.",
        rich_help_panel=NETWORK,
    ),
]
ApiKeysOption = Annotated[
    Path | None,
    typer.Option(
        help="File of API keys (epserve keys new); without it clients need none.",
        rich_help_panel=SECURITY,
    ),
]
LauncherKeyHashOption = Annotated[str | None, typer.Option(envvar=LAUNCHER_KEY_HASH, hidden=True)]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        envvar="EPSERVE_API_KEY",
        hide_input=True,
        help="Key to show; better given in the environment.",
        rich_help_panel=SECURITY,
    ),
]
RankOption = Annotated[
    int | None,
    typer.Option(
        callback=_at_least(0),
        help="Rank in its tier; by default the gateway gives the lowest free.",
        rich_help_panel=PARALLEL,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        callback=_at_least(1),
        help="Threads that one tensor operation may use.",
        rich_help_panel=MODEL,
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
KvCacheTokensOption = Annotated[
    int | None,
    typer.Option(
        callback=_at_least(1),
        help="Tokens that one attention process's KV cache holds. Default, "
        "where no size is given: what --max-num-seqs full contexts need, but at most 65536.",
        rich_help_panel=CACHE,
    ),
]
KvCacheMemoryOption = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="BYTES",
        help="The same in memory per process, as in 2GiB.",
        rich_help_panel=CACHE,
    ),
]
MemoryUtilizationOption = Annotated[
    float | None,
    typer.Option(
        help="The same as a part (0 to 1): of a GPU's memory, with all that is in use beside it; "
        "of the memory that a CPU process finds available once its weights are loaded. "
        "What is left is for activations.",
        rich_help_panel=CACHE,
    ),
]
BlockSizeOption = Annotated[
    int, typer.Option(callback=_at_least(1), help="Tokens per KV block.", rich_help_panel=CACHE)
]
MaxNumSeqsOption = Annotated[
    int,
    typer.Option(
        callback=_at_least(1),
        help="Sequences that one step computes at most.",
        rich_help_panel=CACHE,
    ),
]
MicrobatchesOption = Annotated[
    Microbatches,
    typer.Option(
        help="Parts of a step that take turns: one computes attention while others wait for their "
        "experts. auto: 2 for steps of many tokens where each tier has devices of its own, else 1.",
        rich_help_panel=CACHE,
    ),
]
ExpertWaitOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="How long a step, and a request, wait for an expert process before they give up.",
        rich_help_panel=CACHE,
    ),
]
HedgeAfterOption = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="When an expert process has not answered for so long, ask those that hold the same "
        "experts as well. Default: half of --expert-wait.",
        rich_help_panel=CACHE,
    ),
]
TargetOption = Annotated[
    str, typer.Option(callback=_address, help="HOST:PORT of a gateway.", rich_help_panel=NETWORK)
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
MaxQueuedRequestsOption = Annotated[
    int,
    typer.Option(
        callback=_at_least(0),
        help="Requests that may wait in the gateway for a place; what comes beyond is refused.",
        rich_help_panel=CACHE,
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
AttnWaitOption = Annotated[
    float,
    typer.Option(
        callback=_seconds,
        metavar="SECONDS",
        help="How long requests wait for an attention group where none is left to go on with them.",
        rich_help_panel=CACHE,
    ),
]
OrphanGraceOption = Annotated[
    float,
    typer.Option(
        callback=_seconds,
        metavar="SECONDS",
        help="How long the requests of a lost gateway run on, for their clients to resume them.",
        rich_help_panel=CACHE,
    ),
]
DrainTimeoutOption = Annotated[
    float,
    typer.Option(
        callback=_at_least(0, MAX_DRAIN_TIMEOUT),
        metavar="SECONDS",
        help="How long running requests get to end after a stop signal.",
        rich_help_panel=CACHE,
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


def absolute(files: TlsFiles | None) -> TlsFiles | None:
    """For processes that may run elsewhere."""
    if files is None or files.cert is None or files.key is None:
        return files
    return TlsFiles(files.ca.absolute(), files.cert.absolute(), files.key.absolute())
