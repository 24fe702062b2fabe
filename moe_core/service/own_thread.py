"""Work off the loop in a thread that ends with it, and work that gives way to other processes.

Knows threads. Knows nothing of the work.

libgomp gives every thread that computes a team of its own, and keeps the team as long as the
thread lives. With more threads in teams than cores it no longer lets waiting ones spin, and each of
the hundreds of parallel regions of a step then wakes its workers from sleep. So what computes off
the loop must not stay, as the threads of asyncio's own executor do.
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from moe_core.service.lifecycle import WORKER_THREADS

P = ParamSpec("P")
T = TypeVar("T")

MOST_NICE = 19


async def in_own_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns or raises. When this is cancelled the thread works on to its end."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=WORKER_THREADS)
    try:
        call = partial(work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(executor, call)
    finally:
        executor.shutdown(wait=False)


def gently(niceness: int, work: Callable[P, T]) -> Callable[P, T]:
    """`work` at a lower priority, for a thread that ends with it: Linux gives every thread its own,
    and a thread cannot take back what it has given up. 0: as it is."""

    def lowered(*args: P.args, **kwargs: P.kwargs) -> T:
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, min(own + niceness, MOST_NICE))
        return work(*args, **kwargs)

    return lowered if niceness else work
