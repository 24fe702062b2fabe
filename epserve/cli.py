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

from epserve import (
    admin_commands,
    client_commands,
    process_commands,
    security_commands,
    trial_commands,
)
from epserve.from_options import parallel_from, settings_from
from epserve.options import common, layout, models, network, security, serving
from epserve.parent_death import die_with_parent
from epserve.settings_command import SettingsCommand
from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S
from moe_core.errors import EpserveError
from moe_core.service.tls_files import TlsFiles

EXIT_OK, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2

app = typer.Typer(
    help="Serves Mixture-of-Experts models with attention and experts on two independent tiers.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut long option names: SettingsCommand writes the help
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _all_commands(debug: common.DebugOption = False, version: common.VersionOption = False) -> None:
    """Serves Mixture-of-Experts models with attention and experts on two independent tiers."""


@app.command(cls=SettingsCommand)
def demo(debug: common.DebugOption = False) -> None:
    """Run a small bundled model here; shows what happens."""
    from epserve.demo import demo as run_demo

    run_demo()


@app.command(cls=SettingsCommand)
def serve(
    context: typer.Context,
    model: models.ModelOption,
    attn_devices: layout.AttnDevicesOption = 1,
    dp_size: layout.DpSizeOption = 1,
    expert_devices: layout.ExpertDevicesOption = 1,
    ep_size: layout.EpSizeOption = 1,
    expert_parallel_degree: layout.DegreeOption = None,
    enable_mla: layout.EnableMlaOption = None,
    num_redundant_experts: layout.RedundantOption = 0,
    shared_experts: layout.SharedExpertsOption = "attention",
    colocated: layout.ColocatedOption = False,
    transport: network.TransportOption = "auto",
    device: models.DeviceKindOption = "auto",
    dtype: models.DtypeOption = "auto",
    host: network.HostOption = "127.0.0.1",
    port: network.HttpPortOption = network.DEFAULT_HTTP_PORT,
    grpc_port: network.GrpcPortOption = network.DEFAULT_GRPC_PORT,
    cluster_port: network.ClusterPortOption = network.DEFAULT_CLUSTER_PORT,
    tls_cert: security.TlsCertOption = None,
    tls_key: security.TlsKeyOption = None,
    tls_ca: security.TlsCaOption = None,
    insecure: security.InsecureOption = False,
    api_keys: security.ApiKeysOption = None,
    kv_cache_tokens: serving.KvCacheTokensOption = None,
    kv_cache_memory: serving.KvCacheMemoryOption = None,
    memory_utilization: serving.MemoryUtilizationOption = None,
    max_num_seqs: serving.MaxNumSeqsOption = serving.DEFAULT_MAX_NUM_SEQS,
    block_size: serving.BlockSizeOption = serving.DEFAULT_BLOCK_SIZE,
    microbatches: serving.MicrobatchesOption = "auto",
    expert_wait: serving.ExpertWaitOption = DEFAULT_EXPERT_WAIT_S,
    hedge_after: serving.HedgeAfterOption = None,
    spare_expert_slots: layout.SpareExpertSlotsOption = None,
    max_queued_requests: serving.MaxQueuedRequestsOption = serving.DEFAULT_MAX_QUEUED_REQUESTS,
    rebalance_interval: layout.RebalanceIntervalOption = 0.0,
    attn_wait: serving.AttnWaitOption = serving.DEFAULT_ATTN_WAIT_S,
    orphan_grace: serving.OrphanGraceOption = serving.DEFAULT_ORPHAN_GRACE_S,
    drain_timeout: serving.DrainTimeoutOption = serving.DEFAULT_DRAIN_TIMEOUT,
    otlp_traces_endpoint: common.TracesOption = None,
    log_json: common.LogJsonOption = False,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Serve a model, all processes on this machine."""
    from epserve.cluster_settings import ClusterSettings
    from epserve.serve import serve as run_serve

    run_serve(
        settings_from(
            context,
            ClusterSettings,
            model=model.absolute(),
            parallel=parallel_from(context),
            http_port=port,
            drain_timeout_s=drain_timeout,
            tls=security.absolute(TlsFiles.of_process(tls_cert, tls_key, tls_ca)),
            api_keys=api_keys and api_keys.absolute(),
            expert_wait_s=expert_wait,
            hedge_after_s=hedge_after,
        )
    )


for process_command in (process_commands.gateway, process_commands.attn, process_commands.expert):
    app.command(cls=SettingsCommand)(process_command)


for client_command in (client_commands.generate, client_commands.status, client_commands.top):
    app.command(cls=SettingsCommand)(client_command)
app.command(cls=SettingsCommand)(trial_commands.chaos)
app.add_typer(trial_commands.bench)


@app.command(cls=SettingsCommand)
def manifest(
    directory: Annotated[Path, typer.Argument(help="Model directory.")],
    debug: common.DebugOption = False,
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
    state = common.CliState()
    try:
        command = typer.main.get_command(app)
        result = command.main(
            list(arguments), prog_name="epserve", standalone_mode=False, obj=state
        )
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # which typer does not export
            print(error.format_message(), file=sys.stderr, flush=True)
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


def _complain(message: str, status: int, error: BaseException, state: common.CliState) -> int:
    if state.debug:
        traceback.print_exception(error)
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    print(f"epserve: {' '.join((message + notes).split())}", file=sys.stderr, flush=True)
    return status
