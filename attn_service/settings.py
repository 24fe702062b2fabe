"""What an attention process is told on its command line.

Knows names, defaults and the sizes that follow from them. Knows no model beyond its context
length, and no cluster.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from attn_service.microbatches import AUTO, check_setting
from attn_service.scheduler import SchedulerConfig
from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S, check_expert_wait
from moe_core.config.kv_cache_size import check_kv_cache_size
from moe_core.config.model import ModelConfig
from moe_core.errors import ConfigError
from moe_core.service.binding import require_safe_bind
from moe_core.service.lifecycle import DRAIN_TIMEOUT_S
from moe_core.service.tls_files import TlsFiles
from moe_core.service.trace_option import check_traces_endpoint

DEFAULT_KV_CACHE_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class AttnSettings:
    """host and port are listened on (port 0: any free one); `rank` None asks the gateway for
    the lowest free one. `expert_wait_s`: the longest that one layer may wait for its experts, and a
    sequence for experts that are missing. `hedge_after_s`: the longest that an expert process may
    take before others that hold the same experts are asked as well (None: half of expert_wait_s).
    `orphan_grace_s`: for how long a lost gateway's sequences run on. `insecure` allows a host that
    others reach without `tls`. load_niceness: by how much imports and the loading of weights give
    way to other processes.

    The KV cache is set by one of kv_cache_tokens, kv_cache_memory (bytes) and memory_utilization
    (see moe_core.memory.memory_budget); without, it holds max_num_seqs full contexts, but at
    most 65,536 tokens.
    """

    gateway: str
    model: Path
    host: str = "127.0.0.1"
    port: int = 0
    advertise_address: str | None = None
    rank: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    transport: str = "auto"
    kv_cache_tokens: int | None = None
    kv_cache_memory: int | None = None
    memory_utilization: float | None = None
    block_size: int = 16
    max_num_seqs: int = 64
    max_step_tokens: int = 512
    microbatches: str = AUTO
    expert_wait_s: float = DEFAULT_EXPERT_WAIT_S
    hedge_after_s: float | None = None
    orphan_grace_s: float = 5.0
    threads: int | None = None
    load_niceness: int = 0
    tls: TlsFiles | None = None
    insecure: bool = False
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        require_safe_bind("host", self.host, self.tls, self.insecure)
        if self.block_size < 1:
            raise ConfigError("block_size", self.block_size, "must be at least 1", (16,))
        check_kv_cache_size(self.kv_cache_tokens, self.kv_cache_memory, self.memory_utilization)
        if self.kv_cache_tokens is not None and self.kv_cache_tokens < self.block_size:
            rule = f"must hold at least one block of block_size={self.block_size} tokens"
            raise ConfigError("kv_cache_tokens", self.kv_cache_tokens, rule, (self.block_size,))
        check_setting(self.microbatches)
        check_traces_endpoint(self.otlp_traces_endpoint)
        check_expert_wait(self.expert_wait_s, self.hedge_after_s)
        if not 0 <= self.orphan_grace_s < math.inf:
            rule = "must be a number of seconds of at least 0"
            raise ConfigError("orphan_grace", self.orphan_grace_s, rule, (5.0,))

    def num_kv_blocks(self, model: ModelConfig) -> int:
        """From kv_cache_tokens or its default; kv_budget.py knows the other settings."""
        tokens = self.kv_cache_tokens
        if tokens is None:
            contexts = self.max_num_seqs * model.max_position_embeddings
            tokens = max(self.block_size, min(contexts, DEFAULT_KV_CACHE_TOKENS))
        return tokens // self.block_size

    def scheduler_config(self, model: ModelConfig) -> SchedulerConfig:
        return SchedulerConfig(
            self.max_num_seqs, self.max_step_tokens, model.max_position_embeddings
        )
