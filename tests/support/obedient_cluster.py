"""A registry whose members do what the cluster state asks of them, without a process or a stream.

Knows the registry and what workers report. Knows nothing of who asks.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.cluster import Registry
from gateway.registrations import MemberKey
from moe_core.cluster import (
    AttentionLoad,
    ClusterState,
    ExpertLoad,
    Join,
    MemberState,
    Role,
    StatusReport,
)
from moe_core.config.parallel import ParallelConfig
from support.small_gateway import FINGERPRINT, make_registry

LOAD = AttentionLoad(0, 0, 64, 64, 4, 8)


class ObedientCluster:
    """stubborn: expert ranks that prepare nothing. starts: whether processes that the target wants
    are started. deaf: attention ranks that go on using what they used."""

    def __init__(self, parallel: ParallelConfig) -> None:
        self.registry: Registry = make_registry(parallel)
        self.keys: dict[tuple[Role, int], MemberKey] = {}
        self.stubborn: set[int] = set()
        self.deaf: set[int] = set()
        self.starts = True
        self.history: list[tuple[int, int]] = []  # (placement epoch, next epoch or 0)
        self._serial = 0
        for role in (Role.ATTN, Role.EXPERT):
            for rank in range(self.registry.state.size(role)):
                self.add(role, rank)

    def add(self, role: Role, rank: int) -> None:
        self._serial += 1
        join = Join(role, "h:1", "cpu", 7, FINGERPRINT, self._serial, "float32", "here", rank)
        self.keys[role, rank] = self.registry.join(join)
        self._report(role, rank, self.registry.state.placement.epoch)

    def kill(self, role: Role, rank: int) -> None:
        self.registry.leave(self.keys.pop((role, rank)))

    def route(self, rank: int, load: ExpertLoad) -> None:
        """What the attention process's router has done so far."""
        self.registry.report_expert_load(self.keys[Role.ATTN, rank], load)

    async def obey(self) -> None:
        """Until cancelled."""
        version = 0
        while True:
            state = await self.registry.versions.newer_than(version)
            version = state.version
            following = state.next_placement
            self.history.append(
                (state.placement.epoch, 0 if following is None else following.epoch)
            )
            self._follow(state)

    def _follow(self, state: ClusterState) -> None:
        wanted = state.placement if state.next_placement is None else state.next_placement
        for member in state.members:
            if member.role is Role.EXPERT and member.rank not in self.stubborn:
                self._report(Role.EXPERT, member.rank, wanted.epoch)
            if member.role is Role.ATTN and member.rank not in self.deaf:
                self._report(Role.ATTN, member.rank, state.placement.epoch)
            if member.leaving:
                self.kill(member.role, member.rank)
        if self.starts and state.target is not None:
            sizes = {Role.ATTN: state.target.attn_devices, Role.EXPERT: state.target.expert_devices}
            for role, size in sizes.items():
                for rank in range(size):
                    if (role, rank) not in self.keys:
                        self.add(role, rank)

    def _report(self, role: Role, rank: int, epoch: int) -> None:
        report = StatusReport(MemberState.READY, prepared_epoch=epoch)
        if role is Role.ATTN:
            report = StatusReport(MemberState.READY, attention_load=LOAD, used_epoch=epoch)
        self.registry.report(self.keys[role, rank], report)


@asynccontextmanager
async def obedient(parallel: ParallelConfig) -> AsyncIterator[ObedientCluster]:
    cluster = ObedientCluster(parallel)
    obeying = asyncio.create_task(cluster.obey())
    try:
        yield cluster
    finally:
        obeying.cancel()
        await asyncio.wait({obeying})
    if not obeying.cancelled():
        obeying.result()
