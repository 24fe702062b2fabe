"""What may be done to a member of a cluster, and what was.

Knows names and times. Does nothing.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from epserve.status import member_name
from moe_core.cluster import ClusterState, Member


class Fault(StrEnum):
    KILL = "kill"
    FREEZE = "freeze"
    DELAY = "delay"
    RESTART = "restart"

    @property
    def takes_away(self) -> bool:
        return self is not Fault.DELAY

    @property
    def ends_process(self) -> bool:
        return self in (Fault.KILL, Fault.RESTART)


@dataclass(slots=True)
class Injected:
    """One fault. Times in seconds of time.monotonic(). ended_at: None while it goes on; ready_at:
    when the member was READY again after it, None where it was not yet."""

    fault: Fault
    member: Member
    at: float
    ended_at: float | None = None
    ready_at: float | None = None

    @property
    def name(self) -> str:
        return member_name(self.member)


class Cluster(Protocol):
    """What chaos needs of an EpserveClient to look at a cluster."""

    async def cluster(self, timeout_s: float = 5.0) -> ClusterState: ...
