"""What a rank of an attention group does all day: lead or follow.

Knows an engine or a leader's plans, and how either ends. Knows nothing of how the rank came to
be one or the other.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

from attn_service.engine import Engine
from attn_service.expert_counts import CountedExperts
from attn_service.follow import Followers, GroupTerms, follow
from attn_service.group_experts import GroupRunner
from attn_service.tensor_parallel import GroupLostError, GroupRank
from moe_core.cluster import AttentionLoad, EngineMetrics, ExpertLoad
from moe_core.service.certificates import Certificates


class Duty(Protocol):
    async def run(self) -> None:
        """Until cancelled, or until the group has ended."""

    async def drain(self) -> None:
        """End in order what is under way; `run` is still running."""

    @property
    def load(self) -> AttentionLoad | None: ...

    @property
    def metrics(self) -> EngineMetrics | None: ...

    @property
    def expert_load(self) -> ExpertLoad | None:
        """Waits for the device, so ask seldom."""


class Leading:
    """tp_rank 0: the engine, the ranks that follow it (None in a group of one), and the experts
    where the engine's tokens are counted."""

    def __init__(
        self, engine: Engine, followers: Followers | None, experts: CountedExperts
    ) -> None:
        self.engine = engine
        self._followers = followers
        self._experts = experts

    @property
    def load(self) -> AttentionLoad | None:
        return self.engine.load

    @property
    def metrics(self) -> EngineMetrics | None:
        return self.engine.metrics

    @property
    def expert_load(self) -> ExpertLoad | None:
        return self._experts.load

    async def run(self) -> None:
        if self._followers is None:
            await self.engine.run()
        else:
            await until_first(self.engine.run(), self._until_lost(self._followers))

    async def drain(self) -> None:
        """After a failure the followers' streams are left to break, so that they fail too."""
        await self.engine.sequences.drain()
        if self._followers is not None and self.engine.sequences.failure is None:
            self._followers.close()

    async def _until_lost(self, followers: Followers) -> None:
        """Sequences are told which rank is gone, not only that this one stops."""
        try:
            await followers.lost()
        except GroupLostError as error:
            self.engine.sequences.fail(error)
            raise


class Following:
    """Every other rank: the leader's plans, in order, until the leader ends them."""

    def __init__(
        self,
        leader: str,
        group: GroupRank,
        terms: GroupTerms,
        runner: GroupRunner,
        tls: Certificates | None,
    ) -> None:
        self._leader = leader
        self._tls = tls
        self._group = group
        self._terms = terms
        self._runner = runner
        self._ended = asyncio.Event()

    @property
    def load(self) -> AttentionLoad | None:
        return None

    @property
    def metrics(self) -> EngineMetrics | None:
        return None

    @property
    def expert_load(self) -> ExpertLoad | None:
        return None

    async def run(self) -> None:
        try:
            await follow(self._leader, self._group, self._terms, self._runner.follow, self._tls)
        finally:
            self._ended.set()

    async def drain(self) -> None:
        """The leader drains too, and then ends the plans."""
        await self._ended.wait()


async def until_first(*jobs: Coroutine[Any, Any, None]) -> None:
    """Run all until one ends, cancel the others, and raise what any of them raised."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
