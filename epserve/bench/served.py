"""A cluster that `epserve serve` runs, as a benchmark starts it and hits its members.

Knows the command line and the client. Knows no load and no goal.
"""

import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from epserve.bench.row import NotAvailableError
from epserve.chaos.processes import LocalProcess
from epserve.client import EpserveClient
from epserve.environment import without_settings
from epserve.parent_death import PARENT_PID_VARIABLE
from epserve.restarts import RestartLimits
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.errors import EpserveError, UnavailableError

EPSERVE = (sys.executable, "-P", "-m", "epserve")
READY_TIMEOUT_S, STOP_TIMEOUT_S = 300.0, 45.0
WHOLE_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 300.0
POLL_S = 0.05
LIMITS = RestartLimits()
NOTHING: Mapping[str, str] = MappingProxyType({})
_REFUSED = 2  # the exit status
_TAIL_LINES = 20


@asynccontextmanager
async def served(
    model: Path, *arguments: str, environment: Mapping[str, str] = NOTHING
) -> AsyncIterator["ServedCluster"]:
    """`epserve serve` with these arguments, in float64, once it is ready; stopped at the end.
    `environment` is added to ours.

    Raises NotAvailableError where it refuses an argument, UnavailableError where it ends.
    """
    ports = ("--grpc-port", "0", "--port", "0")
    command = (*EPSERVE, "serve", "--model", str(model), "--dtype", "float64", *ports, *arguments)
    process = await asyncio.create_subprocess_exec(
        *command,
        env={
            **without_settings(os.environ),
            **environment,
            PARENT_PID_VARIABLE: str(os.getpid()),
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        process_group=0,
    )
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    reading = asyncio.create_task(_read(process, tail, ready))
    try:
        await asyncio.wait([ready], timeout=READY_TIMEOUT_S)
        if not ready.done():
            raise UnavailableError(f"epserve serve is not ready after {READY_TIMEOUT_S:g} s")
        target = ready.result()
        async with EpserveClient(target) as client:
            yield ServedCluster(target, client, process)
    finally:
        await _stop(process)
        await reading


async def _read(
    process: asyncio.subprocess.Process, tail: deque[str], ready: "asyncio.Future[str]"
) -> None:
    """To the end of what it prints. `ready` gets the gateway's address, or why there is none."""
    assert process.stdout is not None
    async for line in process.stdout:
        tail.append(line.decode(errors="replace").strip())
        if "ready: serving" in tail[-1] and not ready.done():
            ready.set_result(tail[-1].split(" at ")[1].split()[0])
    status = await process.wait()
    if not ready.done():
        ready.set_exception(_why_ended(status, tail))


def _why_ended(status: int, tail: Sequence[str]) -> Exception:
    last = tail[-1] if tail else f"epserve ended with exit status {status}"
    return NotAvailableError(last) if status == _REFUSED else UnavailableError(last)


async def _stop(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()  # its children die with it
        await process.wait()


async def command(*arguments: str) -> str:
    """What an epserve command prints. Raises NotAvailableError where it refuses its arguments,
    UnavailableError where it fails."""
    process = await asyncio.create_subprocess_exec(
        *EPSERVE,
        *arguments,
        env=without_settings(os.environ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            out, err = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if process.returncode:
        raise _why_ended(process.returncode, err.decode(errors="replace").strip().splitlines())
    return out.decode()


@dataclass(frozen=True, slots=True)
class ServedCluster:
    target: str
    client: EpserveClient
    _serve: asyncio.subprocess.Process
    _ends: dict[tuple[Role, int], list[float]] = field(default_factory=dict)

    async def member(self, role: Role, rank: int) -> Member:
        tier = (await self.client.cluster()).tier(role)
        found = next((each for each in tier if each.rank == rank), None)
        if found is None:
            raise UnavailableError(f"{role} {rank} has left the cluster at {self.target}")
        return found

    async def process(self, role: Role, rank: int) -> LocalProcess:
        return LocalProcess(await self.member(role, rank))

    async def end(self, role: Role, rank: int, number: signal.Signals) -> tuple[Member, float]:
        """Who was sent the signal that ends it, and when: not so often that it would not be started
        again."""
        ends = self._ends.setdefault((role, rank), [])
        await asyncio.sleep(LIMITS.rest_s(ends, time.monotonic()))
        member = await self.member(role, rank)
        with LocalProcess(member) as process:
            process.send(number)
        ends.append(time.monotonic())
        return member, ends[-1]

    @contextmanager
    def unattended(self) -> Iterator[None]:
        """What ends meanwhile is started again only after this: `epserve serve` stands still."""
        self._serve.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._serve.send_signal(signal.SIGCONT)

    async def seconds_until_gone(self, old: Member, timeout_s: float) -> float | None:
        """Until the cluster no longer has the member as READY; None: it still has."""
        return await self._seconds_until(lambda state: not _is_ready(state, old), timeout_s)

    async def whole_after(self, old: Member | None = None) -> float:
        """Seconds until everybody is READY, and `old` has a successor. Raises UnavailableError."""

        def is_whole(state: ClusterState) -> bool:
            replaced = old is None or not _is_ready(state, old)
            return replaced and not any(state.missing(role) for role in Role)

        found = await self._seconds_until(is_whole, WHOLE_TIMEOUT_S)
        if found is None:
            raise UnavailableError(f"the cluster is not whole after {WHOLE_TIMEOUT_S:g} s")
        return found

    async def idle(self) -> float:
        """Seconds until no attention group has a sequence. Raises UnavailableError."""

        def is_idle(state: ClusterState) -> bool:
            loads = [member.attention_load for member in state.tier(Role.ATTN)]
            return all(load and load.num_running + load.num_waiting == 0 for load in loads)

        found = await self._seconds_until(is_idle, WHOLE_TIMEOUT_S)
        if found is None:
            raise UnavailableError(f"sequences are left after {WHOLE_TIMEOUT_S:g} s")
        return found

    async def _seconds_until(
        self, holds: Callable[[ClusterState], bool], timeout_s: float
    ) -> float | None:
        began = time.monotonic()
        while (now := time.monotonic()) < began + timeout_s:
            with suppress(EpserveError):  # the gateway may be what was hit
                if holds(await self.client.cluster()):
                    return now - began
            await asyncio.sleep(POLL_S)
        return None


def _is_ready(state: ClusterState, old: Member) -> bool:
    return any(
        member.instance_epoch == old.instance_epoch and member.state is MemberState.READY
        for member in state.tier(old.role)
    )
