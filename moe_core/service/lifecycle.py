"""The life of every process: start up, serve, drain, and one exit status.

Knows signals, the event loop and deadlines. Knows nothing of what a service does.

One signal drains: `drain` runs while `serve` still does, so that what has begun can end, and is
bounded by a deadline. So does being asked to leave. A second signal leaves at once. `drain` is
called exactly once, whatever happened before, so it is also where a service closes what `startup`
opened.
"""

import asyncio
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import structlog
import uvloop

from moe_core.errors import ConfigError, EpserveError, RequestError, UnavailableError
from moe_core.service.logs import configure_logging, is_debug, logs_json

log = structlog.get_logger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2
DRAIN_TIMEOUT_S = 30.0
WORKER_THREADS_TIMEOUT_S = 2.0
WORKER_THREADS = "epserve-worker"


class Service(Protocol):
    """One process's work.

    startup: opens what is needed; may be cancelled at any await.
    serve: runs until it is cancelled or fails; returning means the work is done.
    drain: ends the work in order and closes everything, from whatever state was reached.
    """

    name: str

    async def startup(self) -> None: ...

    async def serve(self) -> None: ...

    async def drain(self) -> None: ...


@runtime_checkable
class Leavable(Service, Protocol):
    """A service that others may ask to leave."""

    async def asked_to_leave(self) -> None:
        """Returns when it is to drain, as after a signal. Runs beside `serve`, until cancelled."""


def run(service: Service, *, drain_timeout_s: float = DRAIN_TIMEOUT_S) -> int:
    """Run `service` to its end on a new event loop. Returns the exit status: 0 when it ended or
    was drained by a signal, 2 for a setting that was refused, here or by the gateway, 1 for
    everything else; errors are one line on stderr, with a traceback only in a debug run."""
    if not structlog.is_configured():
        configure_logging()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_live(service, drain_timeout_s))
    except EpserveError as error:
        return _complain(service.name, str(error), error)
    except Exception as error:
        what = f"internal error: {type(error).__name__}: {error}"
        return _complain(service.name, what, error)
    return EXIT_OK


async def _live(service: Service, drain_timeout_s: float) -> None:
    executor = ThreadPoolExecutor(thread_name_prefix=WORKER_THREADS)
    asyncio.get_running_loop().set_default_executor(executor)
    stop = _stop_on_signals(service.name)
    try:
        await _live_until(service, stop, drain_timeout_s)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        await _leave_if_threads_linger(service.name)


async def _live_until(service: Service, stop: asyncio.Event, drain_timeout_s: float) -> None:
    stopped: asyncio.Task[Any] = asyncio.create_task(stop.wait(), name="signals")
    working = asyncio.create_task(service.startup(), name="startup")
    reasons = [stopped]
    await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        await _cancel(working)
    elif not working.cancelled() and working.exception() is None:
        working = asyncio.create_task(service.serve(), name="serve")
        if isinstance(service, Leavable):
            reasons.append(asyncio.create_task(service.asked_to_leave(), name="asked to leave"))
        await asyncio.wait({working, *reasons}, return_when=asyncio.FIRST_COMPLETED)
    in_order = await _drain(service, drain_timeout_s)
    tasks = [working, *reasons]
    for task in tasks:
        await _cancel(task)
    for task in tasks:
        if not task.cancelled():
            task.result()
    if all(task.cancelled() for task in tasks):
        raise EpserveError("internal error: its work was cancelled from within")
    if not in_order:
        raise UnavailableError(f"the drain did not end in order within {drain_timeout_s:g} s")


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def _drain(service: Service, drain_timeout_s: float) -> bool:
    """Whether the drain ended well. What goes wrong here must not hide why the service ended."""
    try:
        async with asyncio.timeout(drain_timeout_s):
            await service.drain()
    except TimeoutError:
        log.warning("the drain was cut short", service=service.name, after_s=drain_timeout_s)
        return False
    except Exception:
        log.exception("the drain failed", service=service.name)
        return False
    return True


def _stop_on_signals(name: str) -> asyncio.Event:
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("leaving at once", service=name, signal=number.name)
            _leave(EXIT_FAILED)
        log.info("draining", service=name, signal=number.name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stop


async def _leave_if_threads_linger(name: str) -> None:
    """A thread cannot be cancelled. One that still loads weights would keep the process for
    minutes after a signal, so after a short wait the process leaves without it."""
    deadline = time.monotonic() + WORKER_THREADS_TIMEOUT_S
    while _lingering_threads():
        if time.monotonic() > deadline:
            log.warning("leaving with threads still at work", service=name)
            _leave(EXIT_FAILED)
        await asyncio.sleep(0.01)


def _lingering_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(WORKER_THREADS)]


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _complain(name: str, message: str, error: Exception) -> int:
    line = " ".join(message.split())
    if logs_json():
        log.error("ended", error=line, exc_info=error if is_debug() else None)
    else:
        if is_debug():
            traceback.print_exception(error)
        print(f"epserve {name}: {line}", file=sys.stderr, flush=True)
    return EXIT_REFUSED if isinstance(error, ConfigError | RequestError) else EXIT_FAILED
