"""The `epserve` command: its subcommands, exit statuses and one-line errors.

Knows what each command is called and takes. What a command does is in a module that is imported
when it runs, so that `epserve --help` is quick and the gateway starts without torch.
"""

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from epserve import options as o
from epserve import process_commands
from epserve.parent_death import die_with_parent
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError, EpserveError

EXIT_OK, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2

app = typer.Typer(
    help="Serves Mixture-of-Experts models with attention and experts on two independent tiers.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut long option names on narrow terminals
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _all_commands(debug: o.DebugOption = False) -> None:
    """Serves Mixture-of-Experts models with attention and experts on two independent tiers."""


@app.command()
def demo(debug: o.DebugOption = False) -> None:
    """Run a small bundled model here; shows what happens."""
    from epserve.demo import demo as run_demo

    run_demo()


@app.command()
def serve(
    model: o.ModelOption,
    attn_devices: o.AttnDevicesOption = 1,
    dp_size: o.DpSizeOption = 1,
    expert_devices: o.ExpertDevicesOption = 1,
    ep_size: o.EpSizeOption = 1,
    expert_parallel_degree: o.DegreeOption = None,
    enable_mla: o.EnableMlaOption = None,
    num_redundant_experts: o.RedundantOption = 0,
    shared_experts: o.SharedExpertsOption = "attention",
    colocated: o.ColocatedOption = False,
    transport: o.TransportOption = "auto",
    device: o.DeviceKindOption = "auto",
    dtype: o.DtypeOption = "auto",
    host: o.HostOption = "127.0.0.1",
    port: o.HttpPortOption = o.DEFAULT_HTTP_PORT,
    grpc_port: o.GrpcPortOption = o.DEFAULT_GRPC_PORT,
    kv_cache_tokens: o.KvCacheTokensOption = None,
    kv_cache_memory: o.KvCacheMemoryOption = None,
    memory_utilization: o.MemoryUtilizationOption = None,
    max_num_seqs: o.MaxNumSeqsOption = o.DEFAULT_MAX_NUM_SEQS,
    block_size: o.BlockSizeOption = o.DEFAULT_BLOCK_SIZE,
    microbatches: o.MicrobatchesOption = "auto",
    debug: o.DebugOption = False,
) -> None:
    """Serve a model, all processes on this machine."""
    from epserve.launch_plan import ClusterSettings
    from epserve.serve import serve as run_serve

    parallel = ParallelConfig(
        attn_devices=attn_devices,
        expert_devices=expert_devices,
        dp_size=dp_size,
        ep_size=ep_size,
        enable_mla=enable_mla,
        expert_parallel_degree=expert_parallel_degree,
        num_redundant_experts=num_redundant_experts,
        shared_experts=shared_experts,
        colocated=colocated,
    )
    run_serve(
        ClusterSettings(
            model=model.absolute(),
            parallel=parallel,
            transport=transport,
            device=device,
            dtype=dtype,
            host=host,
            http_port=port,
            grpc_port=grpc_port,
            kv_cache_tokens=kv_cache_tokens,
            kv_cache_memory=kv_cache_memory,
            memory_utilization=memory_utilization,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            microbatches=microbatches,
            debug=debug,
        )
    )


app.command()(process_commands.gateway)
app.command()(process_commands.attn)
app.command()(process_commands.expert)


@app.command()
def generate(
    target: o.TargetOption = o.DEFAULT_TARGET,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(help="Token ids to continue, as in 1,2,3.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most. Default: what fits.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token. Default: 1.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Smallest set with this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest; 0: all.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Only those this likely, relative to the likeliest.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a random choice.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop at; repeatable.")] = None,
    stop_token_ids: Annotated[
        str | None, typer.Option(help="Token ids to stop at, as in 1,2,3.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")
    ] = False,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: less of what was there, prompt included.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Above 0: less of what was generated.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Above 0: less of it, the more often it was.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: logprobs, and of so many likeliest tokens.")
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(help="Token id and what to add to its logit, as in 15=-2.5; repeatable."),
    ] = None,
    min_tokens: Annotated[int | None, typer.Option(help="No stopping before so many.")] = None,
    n: Annotated[int | None, typer.Option(help="Completions of the prompt. Default: 1.")] = None,
    json: o.JsonOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Generate completions of a prompt, printed as they come."""
    from epserve.client import Sampling
    from epserve.generate import generate as run_generate

    if (prompt is None) == (prompt_ids is None):
        raise ConfigError("prompt", prompt, "give exactly one of --prompt and --prompt-ids")
    if logprobs is not None and not json:
        raise ConfigError("logprobs", logprobs, "is shown with --json only; add it")
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=o.token_ids("stop_token_ids", stop_token_ids),
        ignore_eos=ignore_eos,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logprobs=logprobs,
        logit_bias=o.logit_bias(logit_bias or ()),
        min_tokens=min_tokens,
        n=n,
    )
    ids = o.token_ids("prompt_ids", prompt_ids)
    finished = run_generate(target, ids if prompt is None else prompt, sampling, as_json=json)
    raise typer.Exit(EXIT_OK if finished else EXIT_FAILED)


@app.command()
def status(
    target: o.TargetOption = o.DEFAULT_TARGET,
    json: o.JsonOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Show a cluster's processes and links."""
    from epserve.status import status as run_status

    run_status(target, as_json=json)


@app.command()
def top(
    target: o.TargetOption = o.DEFAULT_TARGET,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    debug: o.DebugOption = False,
) -> None:
    """Watch a cluster: load, rates and hot experts, once a second."""
    from epserve.top import top as run_top

    run_top(target, once=once)


@app.command()
def manifest(
    directory: Annotated[Path, typer.Argument(help="Model directory.")],
    debug: o.DebugOption = False,
) -> None:
    """Write the digests of a checkpoint's files."""
    from moe_core.checkpoint.manifest import write_manifest
    from moe_core.checkpoint.progress import shown_progress

    with shown_progress("hashing", "tensor") as progress:
        path = write_manifest(directory, progress)
    typer.echo(f"wrote {path}")


def main() -> int:
    """The console script. Returns the exit status."""
    die_with_parent()
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """One command, its errors printed as one line on stderr."""
    state = o.CliState()
    try:
        command = typer.main.get_command(app)
        result = command.main(
            list(arguments), prog_name="epserve", standalone_mode=False, obj=state
        )
    except typer.TyperException as error:
        if not error.format_message():  # no arguments: the help has been printed
            return EXIT_REFUSED
        return _complain(error.format_message(), error.exit_code, error, state)
    except EpserveError as error:
        refused = error.code == "INVALID_ARGUMENT"
        return _complain(str(error), EXIT_REFUSED if refused else EXIT_FAILED, error, state)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _complain("interrupted", EXIT_FAILED, error, state)
    except Exception as error:
        what = f"internal error: {type(error).__name__}: {error} (--debug shows where)"
        return _complain(what, EXIT_FAILED, error, state)
    return result if isinstance(result, int) else EXIT_OK


def _complain(message: str, status: int, error: BaseException, state: o.CliState) -> int:
    if state.debug:
        traceback.print_exception(error)
    print(f"epserve: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status
