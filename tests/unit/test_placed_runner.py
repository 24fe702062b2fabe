"""Steps and the placement that their plans name, while the cluster goes on to the next."""

import asyncio
from dataclasses import replace

import pytest
import torch

from attn_service import placed_runner
from attn_service.placed_runner import PlacedRunner
from attn_service.placements import Placements
from attn_service.sequence import StepPlan
from attn_service.step_runner import StepResult
from attn_service.step_times import StepTimes
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ProtocolError, UnavailableError
from moe_core.placement import ExpertPlacement
from support.moe_configs import moe_model

FIRST = ExpertPlacement.initial(moe_model(), ParallelConfig(expert_devices=2, ep_size=2))


class Steps:
    """Steps that last until they are let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def execute(self, plan: StepPlan) -> StepResult:
        await self.go.wait()
        return StepResult(torch.zeros(0, 1), StepTimes())


@pytest.fixture
def placements() -> Placements:
    return Placements(FIRST, torch.device("cpu"))


def adopt(placements: Placements, epoch: int) -> None:
    placements.add(replace(FIRST, epoch=epoch))
    placements.forget_unused()


def plan(epoch: int) -> StepPlan:
    return StepPlan(1, epoch, ())


async def test_step_under_way_keeps_the_placement_that_it_began_with(
    placements: Placements,
) -> None:
    steps = Steps()
    step = asyncio.create_task(PlacedRunner(steps, placements).execute(plan(0)))
    await asyncio.sleep(0)
    adopt(placements, 1)
    assert placements.oldest_in_use == 0
    assert placements.knows(0)
    steps.go.set()
    await step
    assert placements.oldest_in_use == 1


async def test_rank_that_adopts_first_still_follows_plans_of_the_epoch_before(
    placements: Placements,
) -> None:
    steps = Steps()
    steps.go.set()
    runner = PlacedRunner(steps, placements)
    adopt(placements, 1)
    await asyncio.wait_for(runner.execute(plan(0)), 1)
    await runner.execute(plan(1))
    placements.forget_unused()
    with pytest.raises(ProtocolError, match="epoch 0 is not known"):
        placements.at(0)


async def test_plan_ahead_of_its_placement_waits_for_it(placements: Placements) -> None:
    steps = Steps()
    steps.go.set()
    step = asyncio.create_task(PlacedRunner(steps, placements).execute(plan(1)))
    await asyncio.sleep(0)
    assert not step.done()
    adopt(placements, 1)
    await asyncio.wait_for(step, 1)


async def test_placement_that_does_not_come_is_named(
    placements: Placements, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed_runner, "KNOWN_TIMEOUT_S", 0.02)
    with pytest.raises(UnavailableError, match="placement epoch 3, which the gateway has not sent"):
        await PlacedRunner(Steps(), placements).execute(plan(3))
