"""What the settings `device`, `dtype` and `threads` mean on this machine.

Knows torch's devices and which of them are here. Knows no role and no model.
"""

import torch

from moe_core.errors import ConfigError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(setting: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:N"; auto is the first GPU, else the CPU.

    Raises ConfigError, naming the devices that are here, for any other.
    """
    available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    wanted = {"auto": available[min(1, len(available) - 1)], "cuda": "cuda:0"}.get(setting, setting)
    if wanted not in available:
        raise ConfigError("device", setting, "there is no such device here", ["auto", *available])
    return torch.device(wanted)


def resolve_dtype(setting: str, model_dtype: str) -> torch.dtype:
    """The dtype of weights and activations; "auto" is the checkpoint's own (`model_dtype`)."""
    name = model_dtype if setting == "auto" else setting
    if name not in DTYPES:
        raise ConfigError("dtype", setting, "is not a dtype to serve in", ["auto", *DTYPES])
    return DTYPES[name]


def set_threads(threads: int | None) -> None:
    """Threads of one torch operation; None leaves torch's own choice. Raises ConfigError."""
    if threads is None:
        return
    if threads < 1:
        raise ConfigError("threads", threads, "must be at least 1", (1,))
    torch.set_num_threads(threads)
