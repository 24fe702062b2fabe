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

from epserve import admin_commands, process_commands, security_commands, trial_commands
from epserve import generate_options as g
from epserve import options as o
from epserve.from_options import parallel_from, settings_from
from epserve.parent_death import die_with_parent
from epserve.settings_command import SettingsCommand
from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S
from moe_core.errors import ConfigError, EpserveError
from moe_core.service.tls_files import TlsFiles

EXIT_OK, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2

app = typer.Typer(
    help="Serves Mixture-of-Experts models with attention and experts on two independent tiers.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut long option names: SettingsCommand writes the help
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _all_commands(debug: o.DebugOption = False) -> None:
    """Serves Mixture-of-Experts models with attention and experts on two independent tiers."""


@app.command(cls=SettingsCommand)
def demo(debug: o.DebugOption = False) -> None:
    """Run a small bundled model here; shows what happens."""
    from epserve.demo import demo as run_demo

    run_demo()


@app.command(cls=SettingsCommand)
def serve(
    context: typer.Context,
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
    cluster_port: o.ClusterPortOption = o.DEFAULT_CLUSTER_PORT,
    tls_cert: o.TlsCertOption = None,
    tls_key: o.TlsKeyOption = None,
    tls_ca: o.TlsCaOption = None,
    insecure: o.InsecureOption = False,
    api_keys: o.ApiKeysOption = None,
    kv_cache_tokens: o.KvCacheTokensOption = None,
    kv_cache_memory: o.KvCacheMemoryOption = None,
    memory_utilization: o.MemoryUtilizationOption = None,
    max_num_seqs: o.MaxNumSeqsOption = o.DEFAULT_MAX_NUM_SEQS,
    block_size: o.BlockSizeOption = o.DEFAULT_BLOCK_SIZE,
    microbatches: o.MicrobatchesOption = "auto",
    expert_wait: o.ExpertWaitOption = DEFAULT_EXPERT_WAIT_S,
    hedge_after: o.HedgeAfterOption = None,
    spare_expert_slots: o.SpareExpertSlotsOption = None,
    max_queued_requests: o.MaxQueuedRequestsOption = o.DEFAULT_MAX_QUEUED_REQUESTS,
    rebalance_interval: o.RebalanceIntervalOption = 0.0,
    attn_wait: o.AttnWaitOption = o.DEFAULT_ATTN_WAIT_S,
    orphan_grace: o.OrphanGraceOption = o.DEFAULT_ORPHAN_GRACE_S,
    drain_timeout: o.DrainTimeoutOption = o.DEFAULT_DRAIN_TIMEOUT,
    otlp_traces_endpoint: o.TracesOption = None,
    log_json: o.LogJsonOption = False,
    config: o.ConfigOption = None,
    dump_config: o.DumpConfigOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Serve a model, all processes on this machine."""
    from epserve.launch_plan import ClusterSettings
    from epserve.serve import serve as run_serve

    run_serve(
        settings_from(
            context,
            ClusterSettings,
            model=model.absolute(),
            parallel=parallel_from(context),
            http_port=port,
            drain_timeout_s=drain_timeout,
            tls=o.absolute(TlsFiles.of_process(tls_cert, tls_key, tls_ca)),
            api_keys=api_keys and api_keys.absolute(),
            expert_wait_s=expert_wait,
            hedge_after_s=hedge_after,
        )
    )


for process_command in (process_commands.gateway, process_commands.attn, process_commands.expert):
    app.command(cls=SettingsCommand)(process_command)


@app.command(cls=SettingsCommand)
def generate(
    target: o.TargetOption = o.DEFAULT_TARGET,
    prompt: g.PromptOption = None,
    prompt_ids: g.PromptIdsOption = None,
    max_tokens: g.MaxTokensOption = None,
    temperature: g.TemperatureOption = None,
    top_p: g.TopPOption = None,
    top_k: g.TopKOption = None,
    min_p: g.MinPOption = None,
    seed: g.SeedOption = None,
    stop: g.StopOption = None,
    stop_token_ids: g.StopTokenIdsOption = None,
    ignore_eos: g.IgnoreEosOption = False,
    repetition_penalty: g.RepetitionPenaltyOption = None,
    presence_penalty: g.PresencePenaltyOption = None,
    frequency_penalty: g.FrequencyPenaltyOption = None,
    logprobs: g.LogprobsOption = None,
    prompt_logprobs: g.PromptLogprobsOption = None,
    logit_bias: g.LogitBiasOption = None,
    min_tokens: g.MinTokensOption = None,
    n: g.NumChoicesOption = None,
    tls_ca: o.TlsCaOption = None,
    tls_cert: o.TlsCertOption = None,
    tls_key: o.TlsKeyOption = None,
    api_key: o.ApiKeyOption = None,
    json: o.JsonOption = False,
    config: o.ConfigOption = None,
    dump_config: o.DumpConfigOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Generate completions of a prompt, printed as they come."""
    from epserve.client import Sampling, Target
    from epserve.generate import generate as run_generate

    if (prompt is None) == (prompt_ids is None):
        raise ConfigError("prompt", prompt, "give exactly one of --prompt and --prompt-ids")
    for name, count in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
        if count is not None and not json:
            raise ConfigError(name, count, "is shown with --json only; add it")
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=g.token_ids("stop_token_ids", stop_token_ids),
        ignore_eos=ignore_eos,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logprobs=logprobs,
        logit_bias=g.logit_bias(logit_bias or ()),
        min_tokens=min_tokens,
        n=n,
        prompt_logprobs=prompt_logprobs,
    )
    ids = g.token_ids("prompt_ids", prompt_ids)
    gateway = Target.of_options(target, tls_ca, tls_cert, tls_key, api_key)
    finished = run_generate(gateway, ids if prompt is None else prompt, sampling, as_json=json)
    if not finished:
        raise EpserveError("interrupted")


@app.command(cls=SettingsCommand)
def status(
    target: o.TargetOption = o.DEFAULT_TARGET,
    tls_ca: o.TlsCaOption = None,
    tls_cert: o.TlsCertOption = None,
    tls_key: o.TlsKeyOption = None,
    api_key: o.ApiKeyOption = None,
    json: o.JsonOption = False,
    config: o.ConfigOption = None,
    dump_config: o.DumpConfigOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Show a cluster's processes and links."""
    from epserve.client import Target
    from epserve.status import status as run_status

    gateway = Target.of_options(target, tls_ca, tls_cert, tls_key, api_key)
    run_status(gateway, as_json=json)


@app.command(cls=SettingsCommand)
def top(
    target: o.TargetOption = o.DEFAULT_TARGET,
    tls_ca: o.TlsCaOption = None,
    tls_cert: o.TlsCertOption = None,
    tls_key: o.TlsKeyOption = None,
    api_key: o.ApiKeyOption = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    config: o.ConfigOption = None,
    dump_config: o.DumpConfigOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Watch a cluster: load, rates and hot experts, once a second."""
    from epserve.client import Target
    from epserve.top import top as run_top

    gateway = Target.of_options(target, tls_ca, tls_cert, tls_key, api_key)
    run_top(gateway, once=once)


app.command(cls=SettingsCommand)(trial_commands.chaos)
app.add_typer(trial_commands.bench)


@app.command(cls=SettingsCommand)
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


for admin_command in (admin_commands.scale, admin_commands.rebalance, admin_commands.drain):
    app.command(cls=SettingsCommand)(admin_command)
app.command(cls=SettingsCommand)(security_commands.certs)
app.add_typer(security_commands.keys)


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
        message = error.format_message().replace("Value error, ", "")  # a library's word for it
        return _complain(message, error.exit_code, error, state)
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
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    print(f"epserve: {' '.join((message + notes).split())}", file=sys.stderr, flush=True)
    return status
