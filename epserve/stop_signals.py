"""Ends an asynchronous piece of work when the user or the system asks this process to stop.

Knows signals and cancellation; knows nothing of the work, which cleans up in its own `finally`.
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run_until_signalled(
    work: Coroutine[None, None, None], on_signal: Callable[[], None] = lambda: None
) -> bool:
    """Run `work` to its end, or cancel it at a signal; True when a signal ended it.

    `on_signal` is called at the first signal. Each further one cancels again, which cuts short
    whatever patience the work's clean-up has.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    signalled = False

    def stop() -> None:
        nonlocal signalled
        if not signalled:
            signalled = True
            on_signal()
        task.cancel()

    numbers = [number for number in STOP_SIGNALS if not _is_under_nohup(number)]
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        await asyncio.wait([task])
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
    if task.cancelled() and signalled:
        return True
    task.result()
    return False


def _is_under_nohup(number: signal.Signals) -> bool:
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
