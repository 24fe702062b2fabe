"""What an expert process loads and drops as the cluster's placements change."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch

from expert_service.batcher import Batcher
from expert_service.expert_runner import ExpertRunner
from expert_service.preparation import Preparation, still_needed
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import CheckpointError
from moe_core.model.weights import ExpertWeights
from moe_core.placement import ExpertPlacement
from support.expert_tier import CPU, cut_layer, whole_layer
from support.moe_configs import moe_model
from support.placements import after

MODEL = moe_model(num_experts=8, top_k=2, num_layers=3)
PARALLEL = ParallelConfig(expert_devices=2, ep_size=2).with_model(MODEL)
FIRST = ExpertPlacement.initial(MODEL, PARALLEL)  # 0..3 and 4..7 in layers 1 and 2
SECOND = after(FIRST, {2: [[0, 1, 7, 3], [4, 5, 6, 2]]})
OTHER = after(FIRST, {1: [[0, 1, 6, 7], [4, 5, 2, 3]]})
EP_RANK = 1
TIMEOUT_S = 10.0


def attention(rank: int, used_epoch: int | None) -> Member:
    ready = MemberState.READY
    return Member(Role.ATTN, rank, 1, "h:1", "cpu", ready, 1, "here", used_epoch=used_epoch)


def weights_of(layer_id: int, logical: int) -> ExpertWeights:
    layer = cut_layer(whole_layer(MODEL, layer_id, torch.float32), (logical,), 0, 1, False)
    return ExpertWeights(layer.w13[0], layer.w2[0])


class States:
    """What Preparation needs of a Membership; the test says what the state is."""

    def __init__(self) -> None:
        self.state = ClusterState(1, PARALLEL, (), FIRST)
        self._changed = asyncio.Condition()

    async def become(self, **changes: object) -> None:
        async with self._changed:
            self.state = replace(self.state, **changes)
            self._changed.notify_all()

    async def next_state(self, seen: ClusterState) -> ClusterState:
        async with self._changed:
            await self._changed.wait_for(lambda: self.state is not seen)
        return self.state


@dataclass
class Source:
    """Gives every expert; `held_back` keeps it waiting, `broken` makes it fail."""

    loaded: list[tuple[int, int]] = field(default_factory=list)
    held_back: asyncio.Event | None = None
    broken: bool = False

    async def expert(self, layer_id: int, logical: int, state: ClusterState) -> ExpertWeights:
        if self.broken:
            raise CheckpointError("tensor t: the file ends at byte 7")
        self.loaded.append((layer_id, logical))
        if self.held_back is not None:
            await self.held_back.wait()
        return weights_of(layer_id, logical)

    async def rest(self) -> None:
        """Nothing to close."""


@dataclass
class Process:
    states: States
    source: Source
    runner: ExpertRunner
    preparation: Preparation
    running: asyncio.Task[None]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                if self.running.done():
                    self.running.result()
                await asyncio.sleep(0.001)

    async def prepared(self, epoch: int) -> None:
        await self.until(lambda: self.preparation.prepared_epoch == epoch)


@asynccontextmanager
async def preparing(
    spare_slots: int | None = None, ep_rank: int = EP_RANK
) -> AsyncIterator[Process]:
    weights = {
        layer.layer_id: cut_layer(
            whole_layer(MODEL, layer.layer_id, torch.float32),
            layer.logical_experts(ep_rank),
            *(0, 1, False),
        )
        for layer in FIRST.layers
    }
    runner = ExpertRunner(weights, FIRST, ep_rank, CPU)
    states, source = States(), Source()
    batcher = Batcher(runner)
    preparation = Preparation(states, runner, batcher, source, lambda: None, spare_slots)
    running = asyncio.create_task(preparation.run())
    try:
        yield Process(states, source, runner, preparation, running)
    finally:
        running.cancel()
        await asyncio.wait({running})


async def test_only_the_changed_layers_missing_experts_are_loaded() -> None:
    async with preparing() as process:
        await process.states.become(next_placement=SECOND)
        await process.prepared(1)
        assert process.source.loaded == [(2, 2)]
        assert process.runner.served == (FIRST, SECOND)


async def test_old_placements_go_once_no_attention_process_uses_them() -> None:
    async with preparing() as process:
        members = (attention(0, 0), attention(1, None))
        await process.states.become(members=members, next_placement=SECOND)
        await process.prepared(1)
        await process.states.become(placement=SECOND, next_placement=None)
        for used in ((1, None), (1, 0)):  # who has said nothing may use any
            members = tuple(attention(rank, epoch) for rank, epoch in enumerate(used))
            await process.states.become(members=members)
            await asyncio.sleep(0.02)
            assert process.runner.served == (FIRST, SECOND)
        await process.states.become(members=(attention(0, 1), attention(1, 1)))
        await process.until(lambda: process.runner.served == (SECOND,))
        assert process.runner.num_experts == 8
        assert process.runner.expert(2, 7) is None


async def test_a_failed_attention_process_keeps_no_placement() -> None:
    frozen = replace(attention(1, 0), state=MemberState.FAILED)
    async with preparing() as process:
        await process.states.become(placement=SECOND, members=(attention(0, 1), frozen))
        await process.until(lambda: process.runner.served == (SECOND,))


async def test_a_withdrawn_placement_is_dropped_also_in_the_middle_of_loading() -> None:
    wide = after(FIRST, {1: [[4, 5, 6, 7], [0, 1, 2, 3]]})
    async with preparing() as process:
        process.source.held_back = asyncio.Event()
        await process.states.become(next_placement=wide)
        await process.until(lambda: len(process.source.loaded) == 1)
        await process.states.become(next_placement=None)
        process.source.held_back.set()
        await asyncio.sleep(0.02)
        assert process.source.loaded == [(1, 0)]
        assert process.runner.num_experts == 8
        assert process.preparation.prepared_epoch == 0


async def test_after_a_withdrawal_another_placement_of_the_same_epoch_is_prepared() -> None:
    async with preparing() as process:
        await process.states.become(next_placement=SECOND)
        await process.prepared(1)
        await process.states.become(next_placement=OTHER)
        await process.until(lambda: process.runner.served == (FIRST, OTHER))
        assert process.source.loaded == [(2, 2), (1, 2), (1, 3)]
        assert process.runner.expert(2, 2) is None


async def test_a_placement_in_use_that_was_never_announced_is_loaded() -> None:
    async with preparing() as process:
        await process.states.become(placement=SECOND)
        await process.prepared(1)


async def test_a_gateway_that_knows_only_an_older_placement_changes_nothing() -> None:
    async with preparing() as process:
        await process.states.become(placement=SECOND, members=(attention(0, 1),))
        await process.until(lambda: process.runner.served == (SECOND,))
        await process.states.become(placement=FIRST)
        await asyncio.sleep(0.02)
        assert process.runner.served == (SECOND,)


async def test_a_rank_that_the_tier_grows_to_begins_empty_and_then_loads() -> None:
    wider = after(FIRST, {2: [[0, 1], [4, 5, 6], [2, 3, 7]]}, ep_size=3)
    async with preparing(ep_rank=2) as process:
        assert process.runner.num_experts == 0
        await process.states.become(next_placement=wider)
        await process.prepared(1)
        assert process.source.loaded == [(2, 2), (2, 3), (2, 7)]


async def test_a_load_that_fails_refuses_the_next_placement_and_serving_goes_on() -> None:
    async with preparing() as process:
        process.source.broken = True
        await process.states.become(next_placement=SECOND)
        await process.until(lambda: bool(process.preparation.refusal))
        assert "placement epoch 1 is not prepared: tensor t" in process.preparation.refusal
        assert process.runner.served == (FIRST,)
        await process.states.become(next_placement=None)
        await process.until(lambda: not process.preparation.refusal)


async def test_a_load_that_fails_for_the_placement_in_use_ends_the_process() -> None:
    async with preparing() as process:
        process.source.broken = True
        await process.states.become(placement=SECOND)
        with pytest.raises(CheckpointError, match="tensor t"):
            await process.prepared(1)


async def test_a_placement_that_needs_more_than_the_spare_slots_is_refused() -> None:
    async with preparing(spare_slots=1) as process:
        await process.states.become(next_placement=OTHER)
        await process.until(lambda: bool(process.preparation.refusal))
        assert "spare_expert_slots=1: placement epoch 1 needs 2" in process.preparation.refusal
        assert process.source.loaded == []
        await process.states.become(next_placement=SECOND)
        await process.prepared(1)
        assert process.preparation.refusal == ""


async def test_spare_slots_that_an_old_placement_takes_are_waited_for() -> None:
    third = after(SECOND, {1: [[0, 1, 2, 7], [4, 5, 6, 3]]})
    async with preparing(spare_slots=1) as process:
        await process.states.become(next_placement=SECOND, members=(attention(0, 0),))
        await process.prepared(1)
        await process.states.become(placement=SECOND, next_placement=third)
        await asyncio.sleep(0.02)
        assert process.source.loaded == [(2, 2)]
        await process.states.become(members=(attention(0, 1),))
        await process.prepared(2)
        assert process.preparation.refusal == ""


def test_a_process_is_needed_while_a_step_may_use_what_is_placed_there() -> None:
    alone = after(FIRST, {1: [range(8)], 2: [range(8)]}, ep_size=1)
    before = ClusterState(1, PARALLEL, (attention(0, 0),), FIRST)
    assert still_needed(before, EP_RANK)
    moved = replace(before, placement=alone)
    assert still_needed(moved, EP_RANK)
    assert not still_needed(replace(moved, members=(attention(0, 1),)), EP_RANK)
    assert not still_needed(replace(moved, members=()), EP_RANK)
