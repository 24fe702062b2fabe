"""A cluster without processes, as a nemesis sees it: states, and members that note signals."""

import signal
from dataclasses import replace
from types import TracebackType

from epserve.chaos.processes import NotThereError
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from moe_core.placement import ExpertPlacement
from moe_core.service.addresses import host_id

PARALLEL = ParallelConfig(attn_devices=2, dp_size=2, expert_devices=2, ep_size=2)


def member(role: Role, rank: int, state: MemberState = MemberState.READY) -> Member:
    pid = 1000 * (1 + list(Role).index(role)) + rank
    return Member(role, rank, pid, f"127.0.0.1:{pid}", "cpu", state, 1, host_id())


def whole_cluster() -> ClusterState:
    workers = [member(role, rank) for role in (Role.ATTN, Role.EXPERT) for rank in range(2)]
    members = (member(Role.GATEWAY, 0), *workers)
    return ClusterState(1, PARALLEL, members, ExpertPlacement(0, 2, 2, ()))


class FakeCluster:
    """`state` None: the gateway does not answer."""

    def __init__(self) -> None:
        self.state: ClusterState | None = whole_cluster()
        self.signals: list[tuple[str, signal.Signals]] = []
        self.gone: set[int] = set()

    async def cluster(self, timeout_s: float = 5.0) -> ClusterState:
        if self.state is None:
            raise UnavailableError("not listening")
        return self.state

    def open_process(self, of: Member) -> "FakeProcess":
        if of.pid in self.gone:
            raise NotThereError(f"{of.role} {of.rank} has ended")
        return FakeProcess(self, of)

    def replace_member(self, role: Role, rank: int, **changed: object) -> None:
        assert self.state is not None
        members = tuple(
            replace(each, **changed) if (each.role, each.rank) == (role, rank) else each
            for each in self.state.members
        )
        self.state = replace(self.state, members=members)

    def remove(self, role: Role, rank: int) -> None:
        assert self.state is not None
        left = tuple(m for m in self.state.members if (m.role, m.rank) != (role, rank))
        self.state = replace(self.state, members=left)


class FakeProcess:
    def __init__(self, cluster: FakeCluster, of: Member) -> None:
        self._cluster = cluster
        self._name = f"{of.role} {of.rank}"

    def __enter__(self) -> "FakeProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def send(self, number: signal.Signals) -> None:
        self._cluster.signals.append((self._name, number))
