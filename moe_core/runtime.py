"""What "auto" means for a worker's device and dtype, and its thread count.

Knows torch's names for them and the model's own dtype. Knows no process and no rank.
"""

import torch

from moe_core.config.model import ModelConfig
from moe_core.errors import ConfigError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str) -> torch.device:
    """"auto" is the first CUDA device where there is one, else the CPU. Raises ConfigError."""
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(available[min(1, len(available) - 1)])
    device = "cuda:0" if name == "cuda" else name
    if device not in available:
        raise ConfigError("device", name, "no such device here", ["auto", *available])
    return torch.device(device)


def resolve_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """"auto" is the dtype that the checkpoint names. Raises ConfigError."""
    chosen = config.dtype if name == "auto" else name
    if chosen not in DTYPES:
        raise ConfigError("dtype", name, f"{chosen} is not served", ["auto", *DTYPES])
    return DTYPES[chosen]


def set_threads(threads: int | None) -> None:
    """Threads of one torch operation; None leaves torch's own choice. Raises ConfigError."""
    if threads is None:
        return
    if threads < 1:
        raise ConfigError("threads", threads, "must be at least 1", (1,))
    torch.set_num_threads(threads)
