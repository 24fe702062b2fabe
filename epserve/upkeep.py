"""Keeps a cluster on this machine as it is to be: starts again what has died, and what a tier
grows by.

Knows which processes are wanted, from the plan and from what the gateway says of its cluster. How a
process is started and stopped is the supervisor's business, when it is started again restarts.py's.

A gateway that was started again knows the sizes of a cluster that was scaled from its workers, and
so is believed only once it has been ready. Processes that have served and leave a tier are asked to
by the gateway, never by this. Those that the cluster no longer wants before they have been ready
are ended from here: nobody needs them, and the gateway may not know of them.

A tier grows by a few processes at a time: each that loads takes a core, and a rank that cannot come
is found out before the others are started.
"""

import asyncio
import os
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

from epserve.client import EpserveClient
from epserve.layout import name_of
from epserve.restarts import Deaths, RestartLimits
from epserve.supervisor import ChildSpec, ProcessEndedError
from moe_core.cluster import ClusterState, MemberState, Role, TierSizes
from moe_core.errors import EpserveError, UnavailableError
from moe_core.listing import listed

RETRY_S = 0.5
REFUSED = 2  # exit status: other settings are needed, another start does not help

Note = Callable[[str], None]
ChildOf = Callable[[Role, int], ChildSpec]
_Place = tuple[Role, int]


class Processes(Protocol):
    """What is needed of a Supervisor."""

    @property
    def pids(self) -> dict[str, int]: ...

    async def start(self, spec: ChildSpec) -> None: ...

    def end(self, name: str) -> None: ...

    async def next_end(self) -> ProcessEndedError: ...

    def forget(self, end: ProcessEndedError) -> None: ...


class Upkeep:
    """Of one cluster; use `run` once."""

    def __init__(
        self,
        processes: Processes,
        child_of: ChildOf,
        sizes: TierSizes,
        note: Note,
        limits: RestartLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        at_once: int | None = None,
    ) -> None:
        """`sizes`: what runs now. `note` is told what is done, and why, a line each. `at_once`: how
        many processes that a tier grows by may be on their way to ready; None: as many as there are
        cores. A TP group, whose ranks wait for one another, starts whole all the same."""
        self._processes = processes
        self._child_of = child_of
        self._note = note
        self._limits = limits or RestartLimits()
        self._clock = clock
        self._at_once = at_once or len(os.sched_getaffinity(0))
        self._tp_size = 1
        self._in_force = self._wanted = sizes
        self._target: TierSizes | None = None
        self._believed: int | None = None  # instance_epoch of a gateway
        self._places: dict[str, _Place] = {"gateway": (Role.GATEWAY, 0)}
        self._deaths: dict[str, Deaths] = {}
        self._leaving: set[int] = set()  # process ids
        self._been_ready: set[int] = set()  # process ids
        self._ended: set[int] = set()  # process ids, of those that were ended from here
        self._arriving: set[str] = set()  # what a tier grows by, until it is ready
        self._dismissed: set[str] = set()
        self._starts: dict[str, asyncio.Task[None]] = {}
        self._add_places()

    async def run(self, client: EpserveClient) -> NoReturn:
        """Until cancelled. Raises ProcessEndedError for a process that cannot be kept up."""
        watching = asyncio.create_task(self._watch(client), name="watch cluster")
        ending = asyncio.create_task(self._processes.next_end(), name="next end")
        try:
            while True:
                tasks = {watching, ending, *self._starts.values()}
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {ending}:
                    task.result()
                self._starts = {n: task for n, task in self._starts.items() if not task.done()}
                if ending in done:
                    self.ended(ending.result())
                    ending = asyncio.create_task(self._processes.next_end(), name="next end")
        finally:
            tasks = {watching, ending, *self._starts.values()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def ended(self, end: ProcessEndedError) -> None:
        """Have a process started again that has ended, or not. Raises `end` where the cluster
        cannot go on without."""
        name = end.name
        self._processes.forget(end)
        self._been_ready.discard(end.pid)
        if end.pid in self._ended:
            self._ended.discard(end.pid)
            self._leaving.discard(end.pid)
        elif end.pid in self._leaving:
            self._leaving.discard(end.pid)
            self._dismissed.add(name)
            self._note(f"{name} has left as it was asked to: {end}")
        elif not self._wants(self._places[name]):
            self._note(f"not started again, since the tier has become smaller: {end}")
        elif (pause_s := self._pause_s(end)) is not None:
            self._note(f"starting {name} again in {pause_s:g} s: {end}")
            self._start(name, pause_s)
        elif self._is_growth(name):
            self._dismissed.add(name)
            self._note(f"the tier does not grow by {name}, nor by more: {end}")
        else:
            raise end
        self._start_missing()

    def take(self, state: ClusterState) -> None:
        """Follow what the gateway says."""
        pids = self._processes.pids
        for member in state.members:
            name = name_of(member.role, member.rank)
            if member.leaving:
                self._leaving.add(member.pid)
            else:
                self._leaving.discard(member.pid)
            if member.state is MemberState.READY and pids.get(name) == member.pid:
                self._deaths_of(name).ready()
                self._been_ready.add(member.pid)
                self._arriving.discard(name)
        if self._is_believed(state):
            self._follow_sizes(state)

    def _is_believed(self, state: ClusterState) -> bool:
        (gateway,) = state.tier(Role.GATEWAY)
        if gateway.state is MemberState.READY:
            self._believed = gateway.instance_epoch
        return gateway.instance_epoch == self._believed

    def _follow_sizes(self, state: ClusterState) -> None:
        if state.target != self._target:
            self._target = state.target
            self._dismissed.clear()
            # Who has left and has not ended yet is asked for again, like who has.
            self._leaving &= {member.pid for member in state.members}
        parallel = state.parallel
        self._tp_size = parallel.tp_size
        self._in_force = TierSizes.of(parallel)
        self._wanted = state.target or self._in_force
        self._add_places()
        self._end_unwanted()
        self._start_missing()

    def _start_missing(self) -> None:
        """Ranks that a tier already has, at once; of those that it grows by, so many that no more
        than `at_once` are on their way, and none once one of them was given up."""
        starting = {name for name, task in self._starts.items() if not task.done()}
        there = self._processes.pids.keys() | starting | self._dismissed
        missing = [n for n, place in self._places.items() if n not in there and self._wants(place)]
        grows = [*filter(self._is_growth, missing)]
        names = [n for n in missing if n not in grows]
        still = self._arriving & there - self._dismissed
        self._arriving = {n for n in still if self._wants(self._places[n])}
        if not any(map(self._is_growth, self._dismissed)):
            room = max(0, max(self._at_once, self._tp_size) - len(self._arriving))
            self._arriving |= {*grows[:room]}
            names += grows[:room]
        for name in names:
            self._note(f"starting {name}: the cluster is to have it")
            self._start(name, 0.0)

    def _end_unwanted(self) -> None:
        unwanted = [
            name
            for name, pid in self._processes.pids.items()
            if pid not in self._been_ready | self._ended and not self._wants(self._places[name])
        ]
        for name in unwanted:
            self._ended.add(self._processes.pids[name])
            self._processes.end(name)
        if unwanted:
            self._note(f"ending {listed(unwanted)}: the cluster is no longer to have so many")

    def _is_growth(self, name: str) -> bool:
        return not _within(self._in_force, *self._places[name])

    def _wants(self, place: _Place) -> bool:
        return _within(self._wanted, *place)

    def _add_places(self) -> None:
        for role, size in self._wanted.by_role.items():
            self._places |= {name_of(role, rank): (role, rank) for rank in range(size)}

    def _pause_s(self, end: ProcessEndedError) -> float | None:
        if end.status == REFUSED:
            return None
        pause_s = self._deaths_of(end.name).pause_s()
        if pause_s is None:
            end.add_note(f"it has ended {self._limits}, and is not started again")
        return pause_s

    def _deaths_of(self, name: str) -> Deaths:
        return self._deaths.setdefault(name, Deaths(self._limits, self._clock))

    def _start(self, name: str, pause_s: float) -> None:
        self._starts[name] = asyncio.create_task(self._start_after(pause_s, name), name=name)

    async def _start_after(self, pause_s: float, name: str) -> None:
        await asyncio.sleep(pause_s)
        place = self._places[name]
        if self._wants(place):
            await self._processes.start(self._child_of(*place))
            self._end_unwanted()  # the cluster may have changed its mind meanwhile

    async def _watch(self, client: EpserveClient) -> NoReturn:
        """A gateway that is gone is started again, so there is no end to this."""
        last_reason = ""
        while True:
            try:
                async for state in client.watch_cluster():
                    self.take(state)
                    last_reason = ""
            except UnavailableError:
                pass
            except EpserveError as error:
                if str(error) != last_reason:
                    self._note(f"what the cluster is to be is not known: {error}")
                last_reason = str(error)
            await asyncio.sleep(RETRY_S)


def _within(sizes: TierSizes, role: Role, rank: int) -> bool:
    return rank < sizes.by_role.get(role, 1)
