"""Starts processes, relays what they print, and stops them all together.

Knows commands, environments, exit statuses and output lines; knows nothing of tiers, ports or
models, nor whether a child that has ended is to be started again. Two invariants: when the context
is left no child is alive, and a child's end before that is told: its name, exit status, and what of
its last lines says why.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

from epserve.environment import without_settings
from epserve.last_words import telling
from epserve.parent_death import PARENT_PID_VARIABLE
from moe_core.errors import EpserveError

_TAIL_LINES = 20
_QUOTED_LINES = 3
_MAX_LINE_BYTES = 16_384
_GRACE_AFTER_FAILURE_S = 5.0
_END_GRACE_S = 5.0
_Result = TypeVar("_Result")

LineSink = Callable[[str, str], None]
"""Called with a child's name and one line that it printed, without the line end."""


class ProcessEndedError(EpserveError):
    """A process that should be running is not: names it, its exit status and its last words."""

    code = "UNAVAILABLE"

    def __init__(self, name: str, pid: int, status: int, tail: Sequence[str]) -> None:
        self.name = name
        self.pid = pid
        self.status = status
        if status == 2:  # the child refused an argument that it was given through us
            self.code = "INVALID_ARGUMENT"
        message = f"{name} (pid {pid}) {describe_status(status)}"
        if tail:
            message += "; it last said: " + " | ".join(tail)
        super().__init__(message)


def describe_status(status: int) -> str:
    """`status` as subprocess counts it: negative is the signal that ended the process."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"was ended by signal {-status}"


def _cancelled_twice() -> bool:
    """Counted, since two cancellations may arrive as one CancelledError."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 1


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process to run. `environment` is added to ours, of which the EPSERVE_ variables are
    left out: they are what we were told, not the child. Lower stages are stopped first."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_stage: int = 0


@dataclass(frozen=True, slots=True)
class _End:
    status: int
    at: float


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    process: asyncio.subprocess.Process
    tail: deque[str]
    watcher: asyncio.Task["_End"]


class Supervisor:
    """Async context manager: entering starts the children, leaving stops them."""

    def __init__(self, specs: Sequence[ChildSpec], sink: LineSink, grace_s: float = 10.0) -> None:
        self._specs = tuple(specs)
        self._sink = sink
        self._grace_s = grace_s
        self._children: list[_Child] = []
        self._ends: asyncio.Queue[_Child] = asyncio.Queue()

    @property
    def pids(self) -> dict[str, int]:
        """Of those that run, or have ended and are not forgotten, by name."""
        return {child.spec.name: child.process.pid for child in self._children}

    async def __aenter__(self) -> "Supervisor":
        try:
            for spec in self._specs:
                await self.start(spec)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, ProcessEndedError):  # what is left cannot finish its work
            self._grace_s = min(self._grace_s, _GRACE_AFTER_FAILURE_S)
            # Being told to stop meanwhile leaves no time, but must not hide why this ended.
            with contextlib.suppress(asyncio.CancelledError):
                await self.stop()
        else:
            await self.stop()

    async def guard(self, work: Coroutine[None, None, _Result]) -> _Result:
        """The result of `work`. Raises ProcessEndedError when a child ends before it is done."""
        task = asyncio.create_task(work)
        watchers = [child.watcher for child in self._children]
        try:
            await asyncio.wait([task, *watchers], return_when=asyncio.FIRST_COMPLETED)
            ended = [child for child in self._children if child.watcher.done()]
            if ended:  # the first is the cause, others may have followed it
                raise self._ended(min(ended, key=lambda child: child.watcher.result().at))
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def start(self, spec: ChildSpec) -> None:
        """Start one more child, of a name that no child has now. Raises OSError."""
        child = await self._start(spec)
        self._children.append(child)
        child.watcher.add_done_callback(lambda _: self._ends.put_nowait(child))

    async def next_end(self) -> ProcessEndedError:
        """Waits until a child has ended. It stays one of the children until `forget`."""
        return self._ended(await self._ends.get())

    def forget(self, end: ProcessEndedError) -> None:
        """A child that has ended is no longer one: its name is free."""
        self._children = [child for child in self._children if child.process.pid != end.pid]

    def end(self, name: str) -> None:
        """Ask a child to end, and kill it if it has not within seconds; `next_end` tells of it as
        of any other."""
        loop = asyncio.get_running_loop()
        for child in self._children:
            if child.spec.name == name:
                self._signal([child], signal.SIGTERM)
                loop.call_later(_END_GRACE_S, self._signal, [child], signal.SIGKILL)

    def kill(self) -> None:
        """End every child now."""
        self._signal(self._children, signal.SIGKILL)

    async def stop(self) -> None:
        """Stage by stage: ask, wait for `grace_s`, then kill. Safe to call twice. Cancelling the
        task that is here a second time, or while it waits here, leaves no more time."""
        grace_s = 0.0 if _cancelled_twice() else self._grace_s
        try:
            for stage in sorted({child.spec.stop_stage for child in self._children}):
                members = [child for child in self._children if child.spec.stop_stage == stage]
                self._signal(members, signal.SIGTERM)
                await asyncio.wait([c.watcher for c in members], timeout=grace_s)
                self._signal(members, signal.SIGKILL)
        finally:
            self.kill()
            for child in self._children:
                await child.watcher

    async def _start(self, spec: ChildSpec) -> _Child:
        # A process group of its own, so that the terminal's Ctrl-C reaches us alone and the
        # children are stopped once and in order.
        process = await asyncio.create_subprocess_exec(
            *spec.command,
            env={
                **without_settings(os.environ),
                **spec.environment,
                PARENT_PID_VARIABLE: str(os.getpid()),
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            process_group=0,
        )
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        watcher = asyncio.create_task(self._watch(spec.name, process, tail), name=spec.name)
        return _Child(spec, process, tail, watcher)

    async def _watch(
        self, name: str, process: asyncio.subprocess.Process, tail: deque[str]
    ) -> _End:
        assert process.stdout is not None
        pending = b""
        while chunk := await process.stdout.read(65_536):
            *lines, pending = (pending + chunk).split(b"\n")
            if len(pending) > _MAX_LINE_BYTES:
                lines, pending = [*lines, pending], b""
            for line in lines:
                self._relay(name, line, tail)
        if pending:
            self._relay(name, pending, tail)
        return _End(await process.wait(), time.monotonic())

    def _relay(self, name: str, line: bytes, tail: deque[str]) -> None:
        # A progress bar rewrites its line: only what it last showed counts.
        text = line.decode(errors="replace").rstrip("\r").rsplit("\r", 1)[-1].rstrip()
        if text:
            tail.append(text)
            self._sink(name, text)

    def _ended(self, child: _Child) -> ProcessEndedError:
        last = telling(child.tail)[-_QUOTED_LINES:]
        return ProcessEndedError(
            child.spec.name, child.process.pid, child.watcher.result().status, last
        )

    def _signal(self, children: Sequence[_Child], number: signal.Signals) -> None:
        for child in children:
            if child.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(number)
