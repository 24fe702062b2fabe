"""Who holds which place by a registration at this gateway, and how well each is heard.

Knows keys, dtypes and leases. Knows no stream, nothing of a member but its place, and not what
follows from silence: cluster.py does.

A gateway that comes to lead is told of members before they have registered with it: those are
awaited here, for ADOPTED_S.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gateway.admittance import Place
from gateway.leases import Clock, LeaseClock
from moe_core.cluster import Member, MemberState, Role
from moe_core.errors import NotFoundError

LEASE_LOST_S = 3.0
NO_LEASE = f"no lease for {LEASE_LOST_S:g} s"
ADOPTED_S = 15.0  # longer than a worker takes to notice that its gateway is gone, and to try others
STALLED_MS = 5_000
STALLED = f"event loop without progress for over {STALLED_MS // 1000} s"


@dataclass(frozen=True, slots=True)
class MemberKey:
    """Names one start of one process; a successor of the same rank has another epoch."""

    role: Role
    rank: int
    instance_epoch: int

    @property
    def place(self) -> Place:
        return self.role, self.rank

    def not_joined(self) -> NotFoundError:
        return NotFoundError(
            f"{self.role} {self.rank} with instance_epoch {self.instance_epoch} is not joined"
        )


@dataclass(slots=True)
class _Registration:
    """is_silent: its leases do not come. is_stalled: they say that its event loop does nothing."""

    key: MemberKey
    dtype: str
    lease: LeaseClock
    is_silent: bool = False
    is_stalled: bool = False


class Registrations:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._held: dict[Place, _Registration] = {}
        self._awaited: dict[Place, LeaseClock] = {}

    @property
    def places(self) -> set[Place]:
        return {*self._held}

    @property
    def dtypes(self) -> dict[Place, str]:
        return {place: each.dtype for place, each in self._held.items()}

    @property
    def silent(self) -> set[Place]:
        return {place for place, each in self._held.items() if each.is_silent}

    @property
    def awaited(self) -> tuple[Place, ...]:
        return tuple(self._awaited)

    @property
    def late(self) -> list[Place]:
        """Who has been awaited for too long; to be asked every CHECK_S."""
        clocks = self._awaited.items()
        return [place for place, clock in clocks if clock.silent_s() >= ADOPTED_S]

    def add(self, key: MemberKey, dtype: str) -> None:
        self._held[key.place] = _Registration(key, dtype, LeaseClock(self._clock))

    def await_all(self, places: Iterable[Place]) -> None:
        """These, and nobody else."""
        self._awaited = {place: LeaseClock(self._clock) for place in places}

    def forget(self, place: Place) -> None:
        self._held.pop(place, None)
        self._awaited.pop(place, None)

    def forget_all(self) -> None:
        self._held.clear()
        self._awaited.clear()

    def holds(self, key: MemberKey) -> bool:
        """Whether the registration of this very `key` still holds its place."""
        held = self._held.get(key.place)
        return held is not None and held.key is key

    def require(self, key: MemberKey) -> None:
        """Raises NotFoundError unless it `holds`."""
        if not self.holds(key):
            raise key.not_joined()

    def heard(self, key: MemberKey, loop_idle_ms: int) -> bool:
        """A lease has come. Whether that changes what is `shown`. Raises NotFoundError where nobody
        has registered here."""
        held = self._held.get(key.place)
        if held is None:
            raise key.not_joined()
        held.lease.heard()
        was_stalled, held.is_stalled = held.is_stalled, loop_idle_ms >= STALLED_MS
        return held.is_stalled != was_stalled

    def has_fallen_silent(self, key: MemberKey) -> bool:
        """Whether it has since the last question; to be asked every CHECK_S."""
        held = self._held.get(key.place)
        if held is None or held.key is not key or held.is_silent:
            return False
        held.is_silent = held.lease.silent_s() >= LEASE_LOST_S
        return held.is_silent

    def is_silent(self, place: Place) -> bool:
        held = self._held.get(place)
        return held is not None and held.is_silent

    def shown(self, member: Member) -> Member:
        """The member, with what its leases say of it."""
        held = self._held.get((member.role, member.rank))
        if held is not None and held.is_silent:
            return replace(member, state=MemberState.FAILED, detail=NO_LEASE)
        if held is not None and held.is_stalled:
            return replace(member, detail="; ".join(filter(None, (member.detail, STALLED))))
        return member
