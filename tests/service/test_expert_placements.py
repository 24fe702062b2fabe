"""Whole expert processes while the cluster's placement changes, and what they read for it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
import torch

from attn_service.experts import StepKey
from attn_service.placements import Placements
from expert_service.expert_bytes import ExpertForm
from expert_service.process import ExpertProcess
from gateway.cluster import Registry
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.placement import ExpertPlacement
from moe_core.service.membership import Membership
from moe_core.transport.handover_servicer import _ByStream
from support.expert_processes import (
    MODEL_DIR,
    TIMEOUT_S,
    connected_client,
    expected,
    join_as_attention,
    running_expert,
    running_registry,
)
from support.expert_tier import CPU, random_routing
from support.placements import after

CHECKPOINT = Checkpoint.open(MODEL_DIR)
CONFIG = CHECKPOINT.config
LAYER = CONFIG.moe_layer_ids[-1]
NUM_EXPERTS = CONFIG.moe.num_experts
HALVES = [list(range(NUM_EXPERTS // 2)), list(range(NUM_EXPERTS // 2, NUM_EXPERTS))]
# As it is stored, which is what is read, and in float64, which is what is held and handed over.
VALUES = 3 * CONFIG.hidden_size * CONFIG.moe.moe_intermediate_size
READ_BYTES, HELD_BYTES = {"float32": 4, "bfloat16": 2}[CONFIG.dtype] * VALUES, 8 * VALUES

EP2 = ParallelConfig(expert_devices=2, ep_size=2)
EP2_ETP2_SHARED = ParallelConfig(expert_devices=4, ep_size=2, shared_experts="expert")


def swapped(old: ExpertPlacement) -> ExpertPlacement:
    """In one layer, the first expert of each half changes places."""
    first, second = ([*half] for half in HALVES)
    first[0], second[0] = second[0], first[0]
    return after(old, {LAYER: [first, second]})


@dataclass
class Cluster:
    registry: Registry
    processes: Sequence[ExpertProcess]
    attention: Membership

    @property
    def state(self) -> ClusterState:
        return self.attention.state

    async def until(self, condition: Callable[[ClusterState], bool]) -> ClusterState:
        return await self.attention.wait_until(condition, TIMEOUT_S, "a test's condition")

    async def prepared(self, epoch: int) -> ClusterState:
        def all_prepared(state: ClusterState) -> bool:
            members = state.tier(Role.EXPERT)
            return all((member.prepared_epoch or 0) >= epoch for member in members)

        return await self.until(all_prepared)

    @property
    def read(self) -> list[int]:
        return [process.weight_bytes_read for process in self.processes]

    @property
    def fetched(self) -> list[int]:
        return [process.weight_bytes_fetched for process in self.processes]


@asynccontextmanager
async def cluster(
    parallel: ParallelConfig, placement: ExpertPlacement | None = None, transport: str = "grpc"
) -> AsyncIterator[Cluster]:
    """All expert processes serving, and an attention process that has joined."""
    async with AsyncExitStack() as stack:
        running = running_registry(parallel, placement)
        address, registry = await stack.enter_async_context(running)
        processes = []
        for rank in range(parallel.expert_devices):
            expert = running_expert(address, rank=rank, transport=transport)
            processes.append(await stack.enter_async_context(expert))
            serving = asyncio.create_task(processes[-1].serve())
            stack.push_async_callback(_cancel, serving)
        attention = await join_as_attention(address, CHECKPOINT)
        stack.push_async_callback(attention.close)
        attention.report(MemberState.READY, used_epoch=registry.state.placement.epoch)
        yield Cluster(registry, processes, attention)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def lost_rows(state: ClusterState, *placements: ExpertPlacement) -> list[str]:
    """Why rows had no answer; those of the others are what one process computes, under every
    placement, at the same time."""
    routing = random_routing(CONFIG, 12, torch.float64, 1)
    wanted = expected(CHECKPOINT, LAYER, routing, state.parallel.shared_on_experts)
    known = Placements(placements[0], CPU)
    for placement in placements[1:]:
        known.add(placement)
    reasons = []
    async with connected_client(state, CHECKPOINT, known) as client:
        for step, placement in enumerate(placements):
            key = StepKey(placement.epoch, step)
            tokens = (routing.hidden, routing.topk_ids, routing.topk_weights)
            combined = await (await client.dispatch(key, LAYER, *tokens)).combine()
            reasons += [lost.reason for lost in combined.lost]
            if not combined.lost:
                close = {"rtol": 1e-12, "atol": 1e-12}
                torch.testing.assert_close(combined.hidden_states, wanted, **close)
    return reasons


async def check_outputs(state: ClusterState, *placements: ExpertPlacement) -> None:
    assert await lost_rows(state, *placements) == []


@pytest.mark.parametrize("transport", ["grpc", "auto"])
@pytest.mark.parametrize("parallel", [EP2, EP2_ETP2_SHARED], ids=["ep2", "ep2_etp2_shared"])
async def test_both_placements_are_served_and_only_what_is_missing_is_fetched(
    parallel: ParallelConfig, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if transport == "auto":  # which takes nixl, so that no expert travels on a stream
        monkeypatch.delattr(_ByStream, "send")
    async with cluster(parallel, transport=transport) as running:
        first, read = running.state.placement, running.read
        second = swapped(first)
        running.registry.set_next(second)
        state = await running.prepared(1)
        await check_outputs(state, first, second)
        # One expert each, all of it from the peer that held it; expert TP cuts it in two.
        etp = running.registry.parallel.etp_size
        assert running.fetched == [HELD_BYTES // etp] * parallel.expert_devices
        assert running.read == read


async def test_an_old_placement_is_refused_once_no_step_uses_it() -> None:
    async with cluster(EP2) as running:
        first = running.state.placement
        second = swapped(first)
        running.registry.set_next(second)
        await running.prepared(1)
        running.registry.set_placement(second, running.registry.parallel)
        state = await running.until(lambda state: state.placement.epoch == 1)
        await check_outputs(state, first, second)
        running.attention.report(MemberState.READY, used_epoch=1)
        await running.until(lambda state: state.tier(Role.ATTN)[0].used_epoch == 1)
        async with asyncio.timeout(TIMEOUT_S):
            while not (reasons := await lost_rows(state, first)):
                await asyncio.sleep(0.01)  # the expert processes hear of it in their own time
        assert "placement epoch 0 is not held by EP rank" in reasons[0]
        await check_outputs(state, second)


async def test_a_process_that_the_tier_grows_to_begins_empty_and_fetches_its_share() -> None:
    first = ExpertPlacement.initial(CONFIG, ParallelConfig().with_model(CONFIG))
    second = after(first, dict.fromkeys(CONFIG.moe_layer_ids, HALVES), ep_size=2)
    async with cluster(EP2, first) as running:
        state = await running.until(lambda state: not state.missing(Role.EXPERT))
        assert [member.experts for member in state.tier(Role.EXPERT)] == [NUM_EXPERTS, 0]
        assert running.read[1] == 0
        running.registry.set_next(second)
        state = await running.prepared(1)
        await check_outputs(state, first, second)
        share = len(CONFIG.moe_layer_ids) * NUM_EXPERTS // 2
        assert running.fetched == [0, share * HELD_BYTES]
        assert running.read[1] == 0


async def test_a_process_that_starts_late_loads_for_the_placement_in_use() -> None:
    first = ExpertPlacement.initial(CONFIG, EP2.with_model(CONFIG))
    later = swapped(after(first, {}, epoch=4))
    async with cluster(EP2, later) as running:
        state = await running.prepared(5)
        await check_outputs(state, later)
        assert sum(running.fetched) == 0


async def test_bytes_that_come_damaged_are_read_from_disk_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = ExpertForm.store

    def damage(form: ExpertForm, weights: object, memory: torch.Tensor) -> bytes:
        digest = store(form, weights, memory)
        memory[100] ^= 1
        return digest

    monkeypatch.setattr(ExpertForm, "store", damage)
    async with cluster(EP2) as running:
        first, read = running.state.placement, running.read
        running.registry.set_next(swapped(first))
        state = await running.prepared(1)
        await check_outputs(state, first, swapped(first))
        assert running.fetched == [0, 0]
        assert running.read == [before + READ_BYTES for before in read]


async def test_a_withdrawn_placement_is_taken_back() -> None:
    async with cluster(EP2) as running:
        running.registry.set_next(swapped(running.state.placement))
        await running.prepared(1)
        running.registry.set_next(None)

        def taken_back(state: ClusterState) -> bool:
            return {member.prepared_epoch for member in state.tier(Role.EXPERT)} == {0}

        state = await running.until(taken_back)
        await check_outputs(state, state.placement)


async def test_a_member_that_is_asked_to_leave_does_so_once_it_is_not_needed() -> None:
    async with cluster(EP2) as running:
        first = running.state.placement
        everything = [list(range(NUM_EXPERTS))]
        alone = after(first, dict.fromkeys(CONFIG.moe_layer_ids, everything), ep_size=1)
        leaving = asyncio.create_task(running.processes[1].asked_to_leave())
        running.registry.set_next(alone)
        await running.prepared(1)
        running.registry.set_leaving(Role.EXPERT, [1])
        running.registry.set_placement(alone, running.registry.parallel)
        await running.until(lambda state: _leaving(state) and state.placement.epoch == 1)
        assert not leaving.done()  # a step may still use the placement before
        running.attention.report(MemberState.READY, used_epoch=1)
        await asyncio.wait_for(leaving, TIMEOUT_S)


def _leaving(state: ClusterState) -> list[Member]:
    return [member for member in state.tier(Role.EXPERT) if member.leaving]
