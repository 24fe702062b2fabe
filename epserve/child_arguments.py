"""The command line that serve gives each process.

Knows the options of every process command, and which of the settings each is told. Starts nothing.
"""

from collections.abc import Sequence

from epserve.cluster_settings import ClusterSettings
from epserve.layout import Place
from epserve.options.network import DEFAULT_REGISTRY
from moe_core.cluster import Role
from moe_core.config.parallel import ParallelConfig


def child_arguments(
    settings: ClusterSettings, parallel: ParallelConfig, place: Place, gateway: str
) -> list[str]:
    """What `place`'s process is told. `gateway`: where a worker registers. `parallel` is settled
    for the model, and ports are chosen."""
    arguments = [place.role.value, "--model", str(settings.model)]
    if settings.debug:
        arguments.append("--debug")
    if settings.tls is not None:
        arguments += settings.tls.arguments()
    if settings.log_json:
        arguments.append("--log-json")
    arguments += _given("--otlp-traces-endpoint", settings.otlp_traces_endpoint)
    arguments += ["--drain-timeout", str(settings.drain_timeout_s)]
    if place.role is Role.GATEWAY:
        return arguments + _gateway_arguments(settings, parallel)
    arguments += ["--gateway", gateway, "--rank", str(place.rank)]
    arguments += ["--device", place.device, "--dtype", settings.dtype]
    arguments += ["--transport", settings.transport]
    if place.role is Role.ATTN:
        return arguments + _attention_arguments(settings)
    return [*arguments, *_given("--spare-expert-slots", settings.spare_expert_slots)]


def _attention_arguments(settings: ClusterSettings) -> list[str]:
    arguments = [*_given("--kv-cache-tokens", settings.kv_cache_tokens)]
    arguments += _given("--kv-cache-memory", settings.kv_cache_memory)
    arguments += _given("--memory-utilization", settings.memory_utilization)
    arguments += _given("--block-size", settings.block_size)
    arguments += _given("--max-num-seqs", settings.max_num_seqs)
    arguments += _given("--microbatches", settings.microbatches)
    arguments += ["--expert-wait", str(settings.expert_wait_s)]
    arguments += _given("--hedge-after", settings.hedge_after_s)
    arguments += _given("--orphan-grace", settings.orphan_grace)
    return arguments


def _gateway_arguments(settings: ClusterSettings, parallel: ParallelConfig) -> list[str]:
    arguments = ["--host", settings.host, "--port", str(settings.http_port)]
    arguments += ["--grpc-port", str(settings.grpc_port), "--registry", DEFAULT_REGISTRY]
    if settings.tls is not None:
        arguments += ["--cluster-port", str(settings.cluster_port)]
    if settings.insecure:
        arguments.append("--insecure")
    arguments += _given("--api-keys", settings.api_keys)
    arguments += _given("--max-queued-requests", settings.max_queued_requests)
    arguments += _given("--rebalance-interval", settings.rebalance_interval)
    arguments += _given("--attn-wait", settings.attn_wait)
    return arguments + _parallel_arguments(parallel)


def _parallel_arguments(parallel: ParallelConfig) -> list[str]:
    """The gateway's flags for a configuration that is settled for its model."""
    arguments = ["--enable-mla" if parallel.enable_mla else "--no-enable-mla"]
    if parallel.colocated:
        arguments.append("--colocated")
    for flag, value in (
        ("--attn-devices", parallel.attn_devices),
        ("--dp-size", parallel.dp_size),
        ("--expert-devices", parallel.expert_devices),
        ("--ep-size", parallel.ep_size),
        ("--expert-parallel-degree", parallel.degree),
        ("--num-redundant-experts", parallel.num_redundant_experts),
        ("--shared-experts", parallel.shared_experts),
    ):
        arguments += _given(flag, value)
    return arguments


def _given(flag: str, value: object | None) -> Sequence[str]:
    return () if value is None else (flag, str(value))
