"""What a cluster on this machine is to be: values, and what of them cannot be.

Knows no process and no command line.
"""

from dataclasses import dataclass, field
from pathlib import Path

from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S, check_expert_wait
from moe_core.config.kv_cache_size import check_kv_cache_size
from moe_core.config.parallel import ParallelConfig
from moe_core.service.binding import require_own_ports, require_safe_bind
from moe_core.service.lifecycle import DRAIN_TIMEOUT_S
from moe_core.service.tls_files import TlsFiles
from moe_core.service.trace_option import check_traces_endpoint


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """A cluster on this machine. None leaves a value to the process that it is for."""

    model: Path
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    transport: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    host: str = "127.0.0.1"
    grpc_port: int = 0  # 0: a free one is chosen when the plan is made
    http_port: int = 0  # likewise
    cluster_port: int = 0  # likewise; used with tls only
    tls: TlsFiles | None = None  # of all processes, so its certificate names all their roles
    insecure: bool = False
    api_keys: Path | None = None
    kv_cache_tokens: int | None = None
    kv_cache_memory: int | None = None  # bytes
    memory_utilization: float | None = None
    block_size: int | None = None
    max_num_seqs: int | None = None
    microbatches: str | None = None
    expert_wait_s: float = DEFAULT_EXPERT_WAIT_S
    hedge_after_s: float | None = None
    spare_expert_slots: int | None = None
    max_queued_requests: int | None = None
    rebalance_interval: float | None = None  # seconds
    attn_wait: float | None = None  # seconds
    orphan_grace: float | None = None  # seconds
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    otlp_traces_endpoint: str | None = None
    log_json: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        check_traces_endpoint(self.otlp_traces_endpoint)
        check_kv_cache_size(self.kv_cache_tokens, self.kv_cache_memory, self.memory_utilization)
        check_expert_wait(self.expert_wait_s, self.hedge_after_s)
        require_safe_bind("host", self.host, self.tls, self.insecure)
        cluster_port = 0 if self.tls is None else self.cluster_port  # unused without TLS
        require_own_ports(
            {"port": self.http_port, "grpc_port": self.grpc_port, "cluster_port": cluster_port}
        )
