"""The nemesis: what it does to which member of a cluster, and when, drawn from a seed.

Knows faults, members and their processes. Knows nothing of the load. Whatever it has stopped runs
again when it ends, however it ends.

It takes a member away (kill, restart, freeze) only from a tier that is whole: of each role at most
one is missing by its doing, until that one is READY again. And it takes none so often that whoever
starts it again would give up on it.
"""

import asyncio
import math
import random
import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Protocol

from epserve.chaos.faults import Cluster, Fault, Injected
from epserve.chaos.processes import LocalProcess, NotThereError
from epserve.restarts import RestartLimits
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.errors import ConfigError, EpserveError

# Half as fast, in short stops: what a process that has more to do looks like from outside.
DELAY_STOP_S, DELAY_RUN_S, DELAY_FOR_S = 0.05, 0.05, 3.0
SHORTEST_FREEZE_S = 0.1
NO_VICTIM_POLL_S = 0.5
LIMITS = RestartLimits()
_SIGNALS = {
    Fault.KILL: signal.SIGKILL,
    Fault.RESTART: signal.SIGTERM,
    Fault.FREEZE: signal.SIGSTOP,
    Fault.DELAY: signal.SIGSTOP,
}


@dataclass(frozen=True, slots=True)
class NemesisSettings:
    """`roles` may be hit, by `faults`. `pause_s`: mean seconds between two; each pause is drawn
    from half of it to one and a half. `freeze_s`: the longest freeze. Raises ConfigError."""

    faults: tuple[Fault, ...]
    roles: tuple[Role, ...]
    seed: int
    pause_s: float
    freeze_s: float

    def __post_init__(self) -> None:
        require_seconds("pause", self.pause_s)
        require_seconds("freeze", self.freeze_s)


def require_seconds(setting: str, value: float) -> None:
    """Raises ConfigError for what is no length of time."""
    if not 0 < value < math.inf:
        raise ConfigError(setting, value, "must be a number of seconds above 0", [1])


class Process(Protocol):
    def send(self, number: signal.Signals) -> None: ...


Group = tuple[Role, int]
OpenProcess = Callable[[Member], AbstractContextManager[Process]]


class Nemesis:
    def __init__(
        self,
        cluster: Cluster,
        settings: NemesisSettings,
        on_fault: Callable[[Injected], None] = lambda _: None,
        open_process: OpenProcess = LocalProcess,
    ) -> None:
        self.injected: list[Injected] = []
        self._cluster = cluster
        self._settings = settings
        self._on_fault = on_fault
        self._open_process = open_process
        self._drawn = random.Random(settings.seed)

    async def run(self, duration_s: float) -> None:
        """Faults, one after the other, until the time is over; one that has begun then still ends.
        Raises UnavailableError for a process that this user may not signal."""
        until = time.monotonic() + duration_s
        while True:
            pause_s = self._settings.pause_s * self._drawn.uniform(0.5, 1.5)
            await asyncio.sleep(max(0.0, min(pause_s, until - time.monotonic())))
            while time.monotonic() < until and not await self._one_fault():
                await asyncio.sleep(NO_VICTIM_POLL_S)
            if time.monotonic() >= until:
                return

    async def _one_fault(self) -> bool:
        """False where there was nobody to hit."""
        try:
            state = await self._cluster.cluster()
        except EpserveError:  # the gateway may be what was hit before
            return False
        missing, spared = missing_roles(self.injected), spared_groups(self.injected)
        found = choices(state, self._settings, missing, spared)
        if not found:
            return False
        fault, member = self._drawn.choice(found)
        try:
            with self._open_process(member) as process:
                await self._inject(fault, member, process)
        except NotThereError:  # it ended just now, and the cluster does not know yet
            return False
        return True

    async def _inject(self, fault: Fault, member: Member, process: Process) -> None:
        process.send(_SIGNALS[fault])
        injected = Injected(fault, member, time.monotonic())
        self.injected.append(injected)
        try:
            self._on_fault(injected)
            if fault is Fault.FREEZE:
                longest = max(SHORTEST_FREEZE_S, self._settings.freeze_s)
                await asyncio.sleep(self._drawn.uniform(SHORTEST_FREEZE_S, longest))
            elif fault is Fault.DELAY:
                await slow_down(process, DELAY_FOR_S)
        finally:
            injected.ended_at = time.monotonic()
            if not fault.ends_process:
                _let_run(process)


def choices(
    state: ClusterState,
    settings: NemesisSettings,
    missing: Collection[Role],
    spared: Collection[Group] = (),
) -> list[tuple[Fault, Member]]:
    """What may be done to whom, in a fixed order. `missing`: roles of which one is away already;
    `spared`: of whom none is to be taken away now."""
    found = []
    for role in settings.roles:
        is_whole = role not in missing and not state.missing(role)
        for fault in settings.faults:
            if is_whole or not fault.takes_away:
                found += [
                    (fault, member)
                    for member in state.tier(role)
                    if member.state is MemberState.READY
                    and not member.leaving
                    and not (fault.takes_away and group_of(member) in spared)
                ]
    return found


def group_of(member: Member) -> Group:
    """Who ends with it: an attention group is lost with any of its processes."""
    return member.role, member.rank if member.dp_rank is None else member.dp_rank


def spared_groups(injected: Sequence[Injected], limits: RestartLimits = LIMITS) -> set[Group]:
    """Of which a process was taken away so often of late that once more might be its last time. A
    process that was frozen may end when it thaws, and so counts from then."""
    now = time.monotonic()
    times: dict[Group, list[float]] = {}
    for each in injected:
        if each.fault.takes_away:
            at = now if each.ended_at is None else each.ended_at
            times.setdefault(group_of(each.member), []).append(at)
    return {group for group, deaths in times.items() if limits.rest_s(deaths, now) > 0}


def missing_roles(injected: Sequence[Injected]) -> set[Role]:
    """Of members that were taken away and are not READY again."""
    return {i.member.role for i in injected if i.fault.takes_away and i.ready_at is None}


async def slow_down(
    process: Process, for_s: float, stop_s: float = DELAY_STOP_S, run_s: float = DELAY_RUN_S
) -> None:
    """Stop it and let it run again, in turns, for so long. It runs when this ends. Raises
    NotThereError when it ends meanwhile."""
    until = time.monotonic() + for_s
    try:
        while time.monotonic() < until:
            process.send(signal.SIGSTOP)
            await asyncio.sleep(stop_s)
            process.send(signal.SIGCONT)
            await asyncio.sleep(run_s)
    finally:
        _let_run(process)


def _let_run(process: Process) -> None:
    with suppress(NotThereError):  # what has ended is not stopped
        process.send(signal.SIGCONT)
