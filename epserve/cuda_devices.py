"""How many CUDA devices this machine has, without importing torch here.

Knows the driver's library and how to ask a process of its own. Gives no device to anybody.
"""

import ctypes
import subprocess
import sys

from moe_core.errors import ConfigError

_DEVICE_QUESTION_TIMEOUT_S = 120.0


def num_cuda_devices(device: str) -> int:
    """How many CUDA devices the processes may use: none for "cpu", and for "auto" where there
    are none. Raises ConfigError for "cuda" without a device."""
    if device == "cpu" or (device == "auto" and not _has_cuda_driver()):
        return 0
    count = _devices_torch_sees()
    if device == "cuda" and count == 0:
        raise ConfigError("device", device, "torch sees no CUDA device on this machine", ["cpu"])
    return count


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _devices_torch_sees() -> int:
    """Asked in a process of its own: importing torch here would cost seconds and memory."""
    question = "import torch; print(torch.cuda.device_count())"
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-c", question],
            capture_output=True,
            text=True,
            timeout=_DEVICE_QUESTION_TIMEOUT_S,
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ConfigError("device", "cuda", f"torch could not be asked: {error}", ["cpu"]) from None
    return int(answer.stdout)
