"""Who leads among gateways that share a registry, and that only that one writes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from unittest.mock import AsyncMock

import pytest

import gateway.election as election_module
from gateway.election import Election
from gateway.layout_record import LAYOUT
from gateway.leadership import UndecidedError
from gateway.placement_leader import PlacementLeader
from moe_core.cluster import Join, Role, StatusReport
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import RequestError, UnavailableError
from moe_core.placement import ExpertPlacement
from moe_core.service.shared_records import SharedLayout
from support.fake_store import FakeEtcd, FakeStore
from support.obedient_cluster import ObedientCluster
from support.small_gateway import FINGERPRINT

PARALLEL = ParallelConfig(attn_devices=2, dp_size=2, expert_devices=2, ep_size=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(election_module, "LOOK_S", 0.005)
    monkeypatch.setattr(election_module, "Following", HeardLeader)


class HeardLeader:
    """Follows without a stream: the test says what is heard."""

    def __init__(self, leader: object, *_: object) -> None:
        self.leader = leader
        self.is_heard = True

    async def close(self) -> None:
        pass


class Gateway:
    def __init__(self, etcd: FakeEtcd, number: int, fingerprint: str = FINGERPRINT) -> None:
        self.cluster = ObedientCluster(PARALLEL)
        self.registry = self.cluster.registry
        self.registry._gateway = replace(self.registry._gateway, instance_epoch=number)
        self.registry.set_address(f"h:{number}")
        self.store = FakeStore(etcd)
        self.ended = 0
        self.election = Election(self.store, self.registry, fingerprint, self._end)
        self.leader = PlacementLeader(self.registry, self.election)
        if number > 1:  # its members are what it was told
            self.registry.stop_leading()

    def take_members(self) -> None:
        """All that the earlier leader had register here, as the same starts."""
        self.cluster._serial = 0
        for role in (Role.ATTN, Role.EXPERT):
            for rank in range(2):
                self.cluster.add(role, rank)

    async def obey(self) -> None:
        await until_for_ever(lambda: self.registry._registrations.places)
        await self.cluster.obey()

    def _end(self) -> None:
        self.ended += 1

    def expire(self) -> None:
        """Its lease ends without its knowing."""
        self.store.etcd.expire(self.election._presence._lease)

    def stop_hearing(self) -> None:
        assert self.election._following is not None
        self.election._following.is_heard = False

    async def change(self) -> ExpertPlacement:
        placement = self.registry.state.placement
        with self.leader.turn("a test"):
            return await self.leader.change(placement.layers, self.registry.parallel, timeout_s=5.0)


@asynccontextmanager
async def gateways(count: int = 2) -> AsyncIterator[tuple[FakeEtcd, list[Gateway]]]:
    """The first leads."""
    etcd, found = FakeEtcd(), []
    tasks = []
    for number in range(1, count + 1):
        each = Gateway(etcd, number)
        found.append(each)
        tasks.append(asyncio.create_task(each.election.run(f"h:{number}")))
        await until(lambda: each.election.leads or each.election._following is not None)  # noqa: B023
    tasks += [asyncio.create_task(each.obey()) for each in found]
    try:
        yield etcd, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def until_for_ever(true: Callable[[], object]) -> None:
    while not true():
        await asyncio.sleep(0.002)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        await until_for_ever(true)


def epochs(etcd: FakeEtcd) -> list[int]:
    return [SharedLayout.decode(value).placement.epoch for value in etcd.layouts]


def standing(each: Gateway) -> str:
    return each.registry.gateway.detail


async def test_one_leads_and_the_other_names_it() -> None:
    async with gateways() as (_, (first, second)):
        assert (first.election.leads, second.election.leads) == (True, False)
        await until(lambda: standing(second) == "follows gateway 0")
        with pytest.raises(UnavailableError, match=r"a test is for the leading gateway, .* h:1"):
            await second.change()
        ranks = {(m.rank, m.address) for m in second.registry.state.tier(Role.GATEWAY)}
        assert ranks == {(0, "h:1"), (1, "h:2")}


async def test_death_of_the_leader_elects_another_that_never_reuses_an_epoch() -> None:
    async with gateways() as (etcd, (first, second)):
        assert (await first.change()).epoch == 1
        first.store.reachable = False
        first.expire()
        second.stop_hearing()
        await until(lambda: second.election.leads)
        assert second.registry.state.placement.epoch == 1
        second.take_members()
        assert (await second.change()).epoch == 2
        assert epochs(etcd) == sorted(epochs(etcd))


async def test_who_hears_the_leader_does_not_take_its_place() -> None:
    async with gateways() as (_, (first, second)):
        first.store.reachable = False
        first.expire()
        await asyncio.sleep(0.05)
        assert not second.election.leads
        first.store.reachable = True
        await until(lambda: first.election._presence._own is not None)
        await asyncio.sleep(0.02)
        assert first.election.leads
        assert first.ended == 0
        assert (await first.change()).epoch == 1


async def test_old_leader_that_wakes_up_can_write_nothing_and_ends_its_registrations() -> None:
    async with gateways() as (etcd, (first, second)):
        look, first.election._look = first.election._look, AsyncMock()  # it sleeps
        first.expire()
        second.stop_hearing()
        await until(lambda: second.election.leads)
        written = list(etcd.layouts)
        assert first.election.leads  # as far as it knows
        with pytest.raises(UnavailableError, match="h:2"):
            await first.change()
        assert etcd.layouts == written
        assert first.registry.state.next_placement is None
        first.election._look = look
        await until(lambda: first.ended == 1)
        assert not first.election.leads
        assert [m.rank for m in first.registry.state.tier(Role.ATTN)] == [0, 1]  # they stay


async def test_outage_costs_changes_only_and_is_said() -> None:
    async with gateways() as (_, (first, second)):
        for each in (first, second):
            each.store.reachable = False
        await until(lambda: "the registry is unreachable" in standing(first))
        await until(lambda: "the registry is unreachable" in standing(second))
        with pytest.raises(UndecidedError, match="cannot be reached"):
            await first.change()
        members = first.registry.state.tier(Role.EXPERT)
        assert len(members) == 2
        for each in (first, second):
            each.store.reachable = True
        await until(lambda: standing(first) == "leads")
        assert (await first.change()).epoch == 2


async def test_change_whose_answer_was_lost_is_used_once_the_registry_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.placement_leader.DECIDE_TIMEOUT_S", 0.05)
    async with gateways() as (etcd, (first, _)):
        first.cluster.stubborn.add(1)
        changing = asyncio.create_task(first.change())
        await until(lambda: first.registry.state.next_placement is not None)
        first.store.loses_answers = True
        first.cluster.stubborn.clear()
        first.registry.set_address("h:1")
        with pytest.raises(UnavailableError, match="placement epoch 1 is prepared"):
            await changing
        with pytest.raises(UnavailableError, match="a test has to wait: placement epoch 1"):
            await first.change()
        first.store.loses_answers = False
        await until(lambda: first.registry.state.placement.epoch == 1)
        assert epochs(etcd)[-1] == 1


async def test_new_leader_changes_nothing_before_its_members_have_registered() -> None:
    async with gateways() as (_, (first, second)):
        first.store.reachable = False
        first.expire()
        second.stop_hearing()
        await until(lambda: second.election.leads)
        with pytest.raises(UnavailableError, match="attn 0, attn 1, expert 0, expert 1"):
            await second.change()
        old = next(m for m in second.registry.state.members if m.role is Role.ATTN)
        join = Join(
            *(Role.ATTN, old.address, "cpu", old.pid, FINGERPRINT, old.instance_epoch, "float32"),
            old.host_id,
            old.rank,
        )
        key = second.registry.join(join)
        assert second.registry.state.tier(Role.ATTN)[0].state is old.state
        second.registry.report(key, StatusReport(old.state))
        assert "attn 0" not in second.registry.adopted


async def test_leader_that_leaves_in_order_is_followed_at_once() -> None:
    async with gateways() as (etcd, (first, second)):
        await first.election.close()
        second.stop_hearing()
        await until(lambda: second.election.leads)
        await asyncio.sleep(0.02)
        assert not first.election.leads
        assert [key for key in etcd.items if key.startswith("live/gateway")] == ["live/gateway/1"]


async def test_another_model_is_refused() -> None:
    async with gateways(1) as (etcd, _):
        other = Gateway(etcd, 2, "blake3:22")
        with pytest.raises(RequestError, match=r"blake3:22.*blake3:11"):
            await other.election.run("h:2")
        assert etcd.items[LAYOUT].value
