"""The commands that run one process of a cluster: gateway, attn and expert.

Knows how their options become each service's settings. The services are imported when one of
them runs, so that the gateway starts without torch.
"""

import typer

from epserve import options as o
from epserve.from_options import parallel_from, settings_from
from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S
from moe_core.service.tls_files import TlsFiles


def gateway(
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
    model_name: o.ModelNameOption = None,
    max_queued_requests: o.MaxQueuedRequestsOption = o.DEFAULT_MAX_QUEUED_REQUESTS,
    rebalance_interval: o.RebalanceIntervalOption = 0.0,
    attn_wait: o.AttnWaitOption = o.DEFAULT_ATTN_WAIT_S,
    host: o.HostOption = "127.0.0.1",
    port: o.HttpPortOption = o.DEFAULT_HTTP_PORT,
    grpc_port: o.GrpcPortOption = o.DEFAULT_GRPC_PORT,
    cluster_port: o.ClusterPortOption = o.DEFAULT_CLUSTER_PORT,
    advertise_address: o.AdvertiseOption = None,
    registry: o.RegistryOption = o.DEFAULT_REGISTRY,
    tls_cert: o.TlsCertOption = None,
    tls_key: o.TlsKeyOption = None,
    tls_ca: o.TlsCaOption = None,
    insecure: o.InsecureOption = False,
    api_keys: o.ApiKeysOption = None,
    launcher_key_hash: o.LauncherKeyHashOption = None,
    drain_timeout: o.DrainTimeoutOption = o.DEFAULT_DRAIN_TIMEOUT,
    otlp_traces_endpoint: o.TracesOption = None,
    log_json: o.LogJsonOption = False,
    config: o.ConfigOption = None,
    dump_config: o.DumpConfigOption = False,
    debug: o.DebugOption = False,
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
    model: o.ModelOption,
    gateway: o.GatewayOption = o.DEFAULT_TARGET,
    host: o.HostOption = "127.0.0.1",
    port: o.WorkerPortOption = 0,
    advertise_address: o.AdvertiseOption = None,
    rank: o.RankOption = None,
    device: o.DeviceOption = "auto",
    dtype: o.DtypeOption = "auto",
    transport: o.TransportOption = "auto",
    kv_cache_tokens: o.KvCacheTokensOption = None,
    kv_cache_memory: o.KvCacheMemoryOption = None,
    memory_utilization: o.MemoryUtilizationOption = None,
    max_num_seqs: o.MaxNumSeqsOption = o.DEFAULT_MAX_NUM_SEQS,
    block_size: o.BlockSizeOption = o.DEFAULT_BLOCK_SIZE,
    microbatches: o.MicrobatchesOption = "auto",
    expert_wait: o.ExpertWaitOption = DEFAULT_EXPERT_WAIT_S,
    hedge_after: o.HedgeAfterOption = None,
    orphan_grace: o.OrphanGraceOption = o.DEFAULT_ORPHAN_GRACE_S,
    threads: o.ThreadsOption = None,
    tls_cert: o.TlsCertOption = None,
    tls_key: o.TlsKeyOption = None,
    tls_ca: o.TlsCaOption = None,
    insecure: o.InsecureOption = False,
    drain_timeout: o.DrainTimeoutOption = o.DEFAULT_DRAIN_TIMEOUT,
    otlp_traces_endpoint: o.TracesOption = None,
    log_json: o.LogJsonOption = False,
    config: o.ConfigOption = None,
    dump_config: o.DumpConfigOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Run one process of the attention tier."""
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
    model: o.ModelOption,
    gateway: o.GatewayOption = o.DEFAULT_TARGET,
    host: o.HostOption = "127.0.0.1",
    port: o.WorkerPortOption = 0,
    advertise_address: o.AdvertiseOption = None,
    rank: o.RankOption = None,
    device: o.DeviceOption = "auto",
    dtype: o.DtypeOption = "auto",
    transport: o.TransportOption = "auto",
    spare_expert_slots: o.SpareExpertSlotsOption = None,
    threads: o.ThreadsOption = None,
    tls_cert: o.TlsCertOption = None,
    tls_key: o.TlsKeyOption = None,
    tls_ca: o.TlsCaOption = None,
    insecure: o.InsecureOption = False,
    drain_timeout: o.DrainTimeoutOption = o.DEFAULT_DRAIN_TIMEOUT,
    otlp_traces_endpoint: o.TracesOption = None,
    log_json: o.LogJsonOption = False,
    config: o.ConfigOption = None,
    dump_config: o.DumpConfigOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Run one process of the expert tier."""
    from expert_service.process import ExpertSettings, main

    _configure_logging("expert", debug, log_json)
    tls = TlsFiles.of_process(tls_cert, tls_key, tls_ca)
    settings = settings_from(context, ExpertSettings, tls=tls, drain_timeout_s=drain_timeout)
    raise typer.Exit(main(settings))


def _configure_logging(service: str, debug: bool, log_json: bool) -> None:
    from moe_core.service.logs import configure_logging

    configure_logging(debug=debug, json_of=service if log_json else None)
