"""The environment that serve gives each process: thread counts and waits for this machine's cores,
and how much libraries say.

Knows the variables that libraries read when they load. Knows no command line.
"""

import os
from collections.abc import Mapping

from epserve.layout import Place
from moe_core.cluster import Role
from moe_core.config.parallel import ParallelConfig

# Below errors they tell of lost peers only, which epserve's own lines name.
_QUIET = {"GRPC_VERBOSITY": "ERROR", "NIXL_LOG_LEVEL": "ERROR", "UCX_LOG_LEVEL": "error"}


def child_environment(place: Place, parallel: ParallelConfig) -> Mapping[str, str]:
    """What libraries read when they load.

    The tiers take turns within a layer, so each tier's processes share out all cores; a rank that
    its tier has grown to gets its share of a tier of that size. What the user has set already
    stays.
    """
    wanted = {"UCX_MM_ERROR_HANDLING": "y", "TOKENIZERS_PARALLELISM": "false", **_QUIET}
    if place.role is not Role.GATEWAY:
        tier = parallel.attn_devices if place.role is Role.ATTN else parallel.expert_devices
        cores = sorted(os.sched_getaffinity(0))
        num_threads = max(1, len(cores) // max(tier, place.rank + 1))
        wanted["OMP_NUM_THREADS"] = str(num_threads)
        wanted["GOMP_SPINCOUNT"] = "5000"
        if num_threads > 1 and place.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            # A rank that the tier has grown to shares the cores of one that was there before.
            slot = place.rank % (len(cores) // num_threads)
            own = cores[slot * num_threads : (slot + 1) * num_threads]
            # One thread a core: the kernel wakes a tier's threads on one core beside an idle one.
            wanted["OMP_PROC_BIND"] = "true"
            wanted["OMP_PLACES"] = ",".join(f"{{{core}}}" for core in own)
    return {name: value for name, value in wanted.items() if name not in os.environ}
