"""How far a long read or write of a checkpoint is, shown to whoever waits for it.

Knows terminals and log lines; knows nothing of checkpoints.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int], None]  # (steps done, steps in all); may come from any one thread
_LOG_INTERVAL_S = 5.0


def no_progress(done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def shown_progress(what: str, unit: str) -> Iterator[Progress]:
    """A bar where stderr is a terminal; elsewhere a log line every few seconds and at the end."""
    if not sys.stderr.isatty():
        yield _logged(what, unit)
        return
    with tqdm(desc=what, unit=unit, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _logged(what: str, unit: str) -> Progress:
    logger = logging.getLogger(__name__)
    started = last = time.monotonic()

    def log(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < _LOG_INTERVAL_S:
            return
        last = now
        logger.info("%s: %d of %d %ss in %.1f s", what, done, total, unit, now - started)

    return log
