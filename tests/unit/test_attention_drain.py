"""The order in which a draining attention process ends, with its parts faked."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attn_service import cluster_upkeep
from attn_service.cluster_upkeep import ClusterUpkeep
from attn_service.process import AttentionProcess
from attn_service.settings import AttnSettings
from moe_core.cluster import LinkStats, MemberState


class Parts:
    """A duty, links, placements and a membership in one; notes what is asked of a closed link."""

    load = metrics = expert_load = None
    missing: tuple[str, ...] = ()
    newest = SimpleNamespace(epoch=0)
    state = SimpleNamespace(placement=newest)
    rank = oldest_in_use = 0

    def __init__(self) -> None:
        self.reconciled = 0
        self.closed = False
        self.told: list[MemberState] = []

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def lost(self) -> None:
        await asyncio.Event().wait()

    async def drain(self) -> None:
        """At once."""

    async def reconcile(self, state: object) -> bool:
        assert not self.closed
        self.reconciled += 1
        return False

    def give_up(self, state: object) -> None:
        assert not self.closed

    async def next_state(self, state: object) -> None:
        await asyncio.Event().wait()

    def add(self, placement: object) -> None:
        """It knows them all."""

    def forget_unused(self) -> None: ...

    def can_serve(self, placement: object) -> bool:
        return True

    def stats(self, source: str) -> tuple[LinkStats, ...]:
        return ()

    def report(self, state: MemberState, **_: object) -> None:
        self.told.append(state)

    async def close(self) -> None:
        """For long enough that whatever keeps the links up would look at them again."""
        self.closed = True
        await asyncio.sleep(5 * cluster_upkeep.TICK_S)


async def test_nothing_looks_at_the_links_once_a_drain_closes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster_upkeep, "TICK_S", 0.01)
    parts: Any = Parts()
    process = AttentionProcess(AttnSettings("127.0.0.1:1", Path("model"), device="cpu"))
    process._duty = process._links = process._membership = parts
    process._upkeep = ClusterUpkeep(parts, parts, parts, parts, lambda ready: None, "")
    serving = asyncio.create_task(process.serve())
    async with asyncio.timeout(10):
        while not parts.reconciled:
            await asyncio.sleep(0.001)
        await process.drain()
        await serving
    assert parts.told[-1] is MemberState.DRAINING


async def test_a_process_that_has_not_served_drains_too() -> None:
    process = AttentionProcess(AttnSettings("127.0.0.1:1", Path("model"), device="cpu"))
    async with asyncio.timeout(10):
        await process.drain()
