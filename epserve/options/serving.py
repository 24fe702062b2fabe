"""The options of requests under way: the KV cache, steps, queues and waits."""

from typing import Annotated, Literal

import typer

from epserve.options.checks import at_least, seconds
from moe_core.config.kv_cache_size import parse_bytes

DEFAULT_BLOCK_SIZE = 16
DEFAULT_MAX_NUM_SEQS = 64
DEFAULT_MAX_QUEUED_REQUESTS = 1024
DEFAULT_ATTN_WAIT_S = 30.0
DEFAULT_ORPHAN_GRACE_S = 5.0
DEFAULT_DRAIN_TIMEOUT = 30.0
MAX_DRAIN_TIMEOUT = 86_400

CACHE = "Cache and scheduling"
Microbatches = Literal["auto", "1", "2", "3"]

KvCacheTokensOption = Annotated[
    int | None,
    typer.Option(
        callback=at_least(1),
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
    int, typer.Option(callback=at_least(1), help="Tokens per KV block.", rich_help_panel=CACHE)
]
MaxNumSeqsOption = Annotated[
    int,
    typer.Option(
        callback=at_least(1),
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
MaxQueuedRequestsOption = Annotated[
    int,
    typer.Option(
        callback=at_least(0),
        help="Requests that may wait in the gateway for a place; what comes beyond is refused.",
        rich_help_panel=CACHE,
    ),
]
AttnWaitOption = Annotated[
    float,
    typer.Option(
        callback=seconds,
        metavar="SECONDS",
        help="How long requests wait for an attention group where none is left to go on with them.",
        rich_help_panel=CACHE,
    ),
]
OrphanGraceOption = Annotated[
    float,
    typer.Option(
        callback=seconds,
        metavar="SECONDS",
        help="How long the requests of a lost gateway run on, for their clients to resume them.",
        rich_help_panel=CACHE,
    ),
]
DrainTimeoutOption = Annotated[
    float,
    typer.Option(
        callback=at_least(0, MAX_DRAIN_TIMEOUT),
        metavar="SECONDS",
        help="How long running requests get to end after a stop signal.",
        rich_help_panel=CACHE,
    ),
]
