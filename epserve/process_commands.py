"""The commands that run one process of a cluster: gateway, attn and expert.

Knows how their options become each service's settings. The services are imported when one of
them runs, so that the gateway starts without torch.
"""

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import typer

from epserve.from_options import parallel_from, settings_from
from epserve.options import common, layout, models, network, security, serving
from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S
from moe_core.service.tls_files import TlsFiles


def gateway(
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
    model_name: models.ModelNameOption = None,
    max_queued_requests: serving.MaxQueuedRequestsOption = serving.DEFAULT_MAX_QUEUED_REQUESTS,
    rebalance_interval: layout.RebalanceIntervalOption = 0.0,
    attn_wait: serving.AttnWaitOption = serving.DEFAULT_ATTN_WAIT_S,
    host: network.HostOption = "127.0.0.1",
    port: network.HttpPortOption = network.DEFAULT_HTTP_PORT,
    grpc_port: network.GrpcPortOption = network.DEFAULT_GRPC_PORT,
    cluster_port: network.ClusterPortOption = network.DEFAULT_CLUSTER_PORT,
    advertise_address: network.AdvertiseOption = None,
    registry: network.RegistryOption = network.DEFAULT_REGISTRY,
    tls_cert: security.TlsCertOption = None,
    tls_key: security.TlsKeyOption = None,
    tls_ca: security.TlsCaOption = None,
    insecure: security.InsecureOption = False,
    api_keys: security.ApiKeysOption = None,
    launcher_key_hash: security.LauncherKeyHashOption = None,
    drain_timeout: serving.DrainTimeoutOption = serving.DEFAULT_DRAIN_TIMEOUT,
    otlp_traces_endpoint: common.TracesOption = None,
    log_json: common.LogJsonOption = False,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Run the gateway of a cluster."""
    from gateway.entrance import QueueLimits
    from gateway.process import main
    from gateway.settings import GatewaySettings

    _configure_logging("gateway", debug, log_json)
    settings = settings_from(
        context,
        GatewaySettings,
        port=grpc_port,
        http_port=port,
        parallel=parallel_from(context),
        limits=QueueLimits(max_requests=max_queued_requests),
        attn_wait_s=attn_wait,
        tls=TlsFiles.of_process(tls_cert, tls_key, tls_ca),
        drain_timeout_s=drain_timeout,
    )
    raise typer.Exit(main(settings))


def attn(
    context: typer.Context,
    model: models.ModelOption,
    gateway: network.GatewayOption = network.DEFAULT_TARGET,
    host: network.HostOption = "127.0.0.1",
    port: network.WorkerPortOption = 0,
    advertise_address: network.AdvertiseOption = None,
    rank: layout.RankOption = None,
    device: models.DeviceOption = "auto",
    dtype: models.DtypeOption = "auto",
    transport: network.TransportOption = "auto",
    kv_cache_tokens: serving.KvCacheTokensOption = None,
    kv_cache_memory: serving.KvCacheMemoryOption = None,
    memory_utilization: serving.MemoryUtilizationOption = None,
    max_num_seqs: serving.MaxNumSeqsOption = serving.DEFAULT_MAX_NUM_SEQS,
    block_size: serving.BlockSizeOption = serving.DEFAULT_BLOCK_SIZE,
    microbatches: serving.MicrobatchesOption = "auto",
    expert_wait: serving.ExpertWaitOption = DEFAULT_EXPERT_WAIT_S,
    hedge_after: serving.HedgeAfterOption = None,
    orphan_grace: serving.OrphanGraceOption = serving.DEFAULT_ORPHAN_GRACE_S,
    threads: models.ThreadsOption = None,
    load_niceness: models.LoadNicenessOption = 0,
    tls_cert: security.TlsCertOption = None,
    tls_key: security.TlsKeyOption = None,
    tls_ca: security.TlsCaOption = None,
    insecure: security.InsecureOption = False,
    drain_timeout: serving.DrainTimeoutOption = serving.DEFAULT_DRAIN_TIMEOUT,
    otlp_traces_endpoint: common.TracesOption = None,
    log_json: common.LogJsonOption = False,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Run one process of the attention tier."""
    _import_gently("attn_service.process", load_niceness)
    from attn_service.process import AttnSettings, main

    _configure_logging("attn", debug, log_json)
    tls = TlsFiles.of_process(tls_cert, tls_key, tls_ca)
    settings = settings_from(
        context,
        AttnSettings,
        expert_wait_s=expert_wait,
        hedge_after_s=hedge_after,
        orphan_grace_s=orphan_grace,
        tls=tls,
        drain_timeout_s=drain_timeout,
    )
    raise typer.Exit(main(settings))


def expert(
    context: typer.Context,
    model: models.ModelOption,
    gateway: network.GatewayOption = network.DEFAULT_TARGET,
    host: network.HostOption = "127.0.0.1",
    port: network.WorkerPortOption = 0,
    advertise_address: network.AdvertiseOption = None,
    rank: layout.RankOption = None,
    device: models.DeviceOption = "auto",
    dtype: models.DtypeOption = "auto",
    transport: network.TransportOption = "auto",
    spare_expert_slots: layout.SpareExpertSlotsOption = None,
    threads: models.ThreadsOption = None,
    load_niceness: models.LoadNicenessOption = 0,
    tls_cert: security.TlsCertOption = None,
    tls_key: security.TlsKeyOption = None,
    tls_ca: security.TlsCaOption = None,
    insecure: security.InsecureOption = False,
    drain_timeout: serving.DrainTimeoutOption = serving.DEFAULT_DRAIN_TIMEOUT,
    otlp_traces_endpoint: common.TracesOption = None,
    log_json: common.LogJsonOption = False,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Run one process of the expert tier."""
    _import_gently("expert_service.process", load_niceness)
    from expert_service.process import ExpertSettings, main

    _configure_logging("expert", debug, log_json)
    tls = TlsFiles.of_process(tls_cert, tls_key, tls_ca)
    settings = settings_from(context, ExpertSettings, tls=tls, drain_timeout_s=drain_timeout)
    raise typer.Exit(main(settings))


def _import_gently(module: str, niceness: int) -> None:
    """Most of a start is spent here: seconds of a core, for torch."""
    from moe_core.service.own_thread import gently

    if niceness:
        with ThreadPoolExecutor(1) as own_thread:
            own_thread.submit(gently(niceness, import_module), module).result()


def _configure_logging(service: str, debug: bool, log_json: bool) -> None:
    from moe_core.service.logs import configure_logging

    configure_logging(debug=debug, json_of=service if log_json else None)
