"""How many KV blocks this process has, however that was set.

Knows the settings, what a token takes and what memory is left. Knows no block and no peer: what
the ranks of a group make of their numbers is kv_agreement.py's.
"""

import torch

from attn_service.settings import AttnSettings
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.memory import memory_budget
from moe_core.model.kv_cache import bytes_per_token


def num_kv_blocks(
    settings: AttnSettings,
    model: ModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Measures, with memory_utilization, what is left now: call it when the weights are loaded.

    `parallel` is settled for the model. Raises ConfigError where not one block fits.
    """
    token_bytes = bytes_per_token(model, bool(parallel.enable_mla), parallel.tp_size, dtype)
    block_bytes = token_bytes * settings.block_size
    block = f"one KV block of block_size={settings.block_size} tokens takes {block_bytes} bytes"
    if settings.kv_cache_memory is not None:
        if settings.kv_cache_memory < block_bytes:
            value = settings.kv_cache_memory
            raise ConfigError("kv_cache_memory", value, block, (block_bytes,))
        return settings.kv_cache_memory // block_bytes
    if settings.memory_utilization is not None:
        return _measured(settings.memory_utilization, device, block_bytes, block)
    return settings.num_kv_blocks(model)


def _measured(fraction: float, device: torch.device, block_bytes: int, block: str) -> int:
    try:
        budget = memory_budget(device, fraction)
    except (OSError, ValueError) as error:
        rule = f"the memory of {device} cannot be read here ({error}); set kv_cache_memory"
        raise ConfigError("memory_utilization", fraction, rule) from error
    if budget < block_bytes:
        rule = f"leaves {max(0, budget)} bytes of {device} beside what is in use, but {block}"
        raise ConfigError("memory_utilization", fraction, rule)
    return budget // block_bytes
