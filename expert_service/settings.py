"""The settings of one expert process.

Knows what they mean and which values are refused. Knows nothing of what is done with them.
"""

from dataclasses import dataclass
from pathlib import Path

from moe_core.errors import ConfigError
from moe_core.service.binding import require_safe_bind
from moe_core.service.lifecycle import DRAIN_TIMEOUT_S
from moe_core.service.tls_files import TlsFiles
from moe_core.service.trace_option import check_traces_endpoint


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """host and port are listened on (port 0: any free one); `rank` None asks the gateway for
    the lowest free one; `threads` None leaves torch's own choice of intra-op threads. `insecure`
    allows a host that others reach without `tls`. spare_expert_slots: see Preparation."""

    gateway: str
    model: Path
    host: str = "127.0.0.1"
    port: int = 0
    advertise_address: str | None = None
    rank: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    transport: str = "auto"
    threads: int | None = None
    load_niceness: int = 0
    spare_expert_slots: int | None = None
    tls: TlsFiles | None = None
    insecure: bool = False
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        require_safe_bind("host", self.host, self.tls, self.insecure)
        check_traces_endpoint(self.otlp_traces_endpoint)
        spare = self.spare_expert_slots
        if spare is not None and spare < 1:
            rule = "must be at least 1, or no expert could ever move"
            raise ConfigError("spare_expert_slots", spare, rule, (1,))
