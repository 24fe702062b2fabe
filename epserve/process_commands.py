"""The commands that run one process of a cluster: gateway, attn and expert.

Knows how their options become each service's settings. The services are imported when one of
them runs, so that the gateway starts without torch.
"""

from typing import Annotated

import typer

from epserve import options as o
from moe_core.config.parallel import ParallelConfig


def gateway(
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
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: its directory.")
    ] = None,
    host: o.HostOption = "127.0.0.1",
    port: o.HttpPortOption = o.DEFAULT_HTTP_PORT,
    grpc_port: o.GrpcPortOption = o.DEFAULT_GRPC_PORT,
    debug: o.DebugOption = False,
) -> None:
    """Run the gateway of a cluster."""
    from gateway.process import GatewaySettings, main

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
    _configure_logging(debug)
    settings = GatewaySettings(
        model=model,
        host=host,
        port=grpc_port,
        parallel=parallel,
        model_name=model_name,
        http_port=port,
    )
    raise typer.Exit(main(settings))


def attn(
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
    threads: o.ThreadsOption = None,
    debug: o.DebugOption = False,
) -> None:
    """Run one process of the attention tier."""
    from attn_service.process import AttnSettings, main

    _configure_logging(debug)
    settings = AttnSettings(
        gateway=gateway,
        model=model,
        host=host,
        port=port,
        advertise_address=advertise_address,
        rank=rank,
        device=device,
        dtype=dtype,
        transport=transport,
        kv_cache_tokens=kv_cache_tokens,
        kv_cache_memory=kv_cache_memory,
        memory_utilization=memory_utilization,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        microbatches=microbatches,
        threads=threads,
    )
    raise typer.Exit(main(settings))


def expert(
    model: o.ModelOption,
    gateway: o.GatewayOption = o.DEFAULT_TARGET,
    host: o.HostOption = "127.0.0.1",
    port: o.WorkerPortOption = 0,
    advertise_address: o.AdvertiseOption = None,
    rank: o.RankOption = None,
    device: o.DeviceOption = "auto",
    dtype: o.DtypeOption = "auto",
    transport: o.TransportOption = "auto",
    threads: o.ThreadsOption = None,
    debug: o.DebugOption = False,
) -> None:
    """Run one process of the expert tier."""
    from expert_service.process import ExpertSettings, main

    _configure_logging(debug)
    settings = ExpertSettings(
        gateway=gateway,
        model=model,
        host=host,
        port=port,
        advertise_address=advertise_address,
        rank=rank,
        device=device,
        dtype=dtype,
        transport=transport,
        threads=threads,
    )
    raise typer.Exit(main(settings))


def _configure_logging(debug: bool) -> None:
    from moe_core.service.logs import configure_logging

    configure_logging(debug=debug)
