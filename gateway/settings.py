"""What a gateway process is told when it starts, and what of it cannot be.

Knows values and their rules; starts nothing.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from gateway.entrance import QueueLimits
from gateway.etcd_store import EMBEDDED, EtcdAddress, parse_registry
from gateway.rebalancing import check_rebalance_interval
from gateway.waiting_room import DEFAULT_ATTN_WAIT_S
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.service import lifecycle
from moe_core.service.addresses import (
    WITH_PORT,
    advertised_address,
    join_address,
    split_address,
)
from moe_core.service.binding import require_own_ports, require_safe_bind
from moe_core.service.tls_files import TlsFiles
from moe_core.service.trace_option import check_traces_endpoint


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """`model` is a Hugging Face directory; `model_name` None: the directory's name. `port` is
    gRPC's; 0 is any free one, also for http_port.

    With `tls`, `port` is for clients and `cluster_port` for processes and everybody else who has a
    certificate; without, `port` is for all, and only on a loopback `host` unless `insecure`.
    `registry`: as etcd_store.parse_registry takes it. `advertise_address`: where others reach this
    gateway, HOST or HOST:PORT (of gRPC), if not where it listens.
    `rebalance_interval` is how often experts are placed anew; 0: when asked only.
    `api_keys` is a file of keys (api_keys.py), `launcher_key_hash` that of one key more.
    `attn_wait_s`: how long requests wait for an attention group where none can go on with them.
    """

    model: Path
    host: str
    port: int
    parallel: ParallelConfig
    model_name: str | None = None
    http_port: int = 0
    limits: QueueLimits = field(default_factory=QueueLimits)
    cluster_port: int = 0
    tls: TlsFiles | None = None
    insecure: bool = False
    drain_timeout_s: float = lifecycle.DRAIN_TIMEOUT_S
    api_keys: Path | None = None
    launcher_key_hash: str | None = None
    otlp_traces_endpoint: str | None = None
    rebalance_interval: float = 0.0
    attn_wait_s: float = DEFAULT_ATTN_WAIT_S
    registry: str = EMBEDDED
    advertise_address: str | None = None

    @property
    def etcd(self) -> EtcdAddress | None:
        return parse_registry(self.registry, self.insecure)

    def advertised(self, port: int) -> str:
        """Where others reach this gateway's `port`."""
        if self.advertise_address is None and self.etcd is None:
            return join_address(self.host, port)
        towards = "127.0.0.1:1" if self.etcd is None else self.etcd.addresses[0]
        return advertised_address(self.host, port, self.advertise_address, towards)

    def cluster_address(self, port: int) -> str:
        """Where processes and other gateways reach this one: `port` is the cluster's, with TLS."""
        if self.advertise_address is None or self.tls is None:
            return self.advertised(port)
        advertised = self.advertise_address
        if WITH_PORT.fullmatch(advertised):
            advertised, _ = split_address("advertise_address", advertised)
        return join_address(advertised, port)

    def __post_init__(self) -> None:
        parse_registry(self.registry, self.insecure)
        check_rebalance_interval(self.rebalance_interval)
        require_safe_bind("host", self.host, self.tls, self.insecure)
        cluster_port = 0 if self.tls is None else self.cluster_port  # unused without TLS
        require_own_ports(
            {"port": self.http_port, "grpc_port": self.port, "cluster_port": cluster_port}
        )
        check_traces_endpoint(self.otlp_traces_endpoint)
        if not 0 <= self.attn_wait_s < math.inf:
            rule = "must be a number of seconds of at least 0"
            raise ConfigError("attn_wait_s", self.attn_wait_s, rule, (DEFAULT_ATTN_WAIT_S,))
