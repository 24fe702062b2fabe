"""Runs a step with the placement that its plan names, once this process knows it.

Knows epochs and the plan. Knows no layer and no link: the leader of a group plans with a placement
that it has, a rank that follows may hear of it a moment later than of the plan.
"""

import asyncio

from attn_service.placements import Placements
from attn_service.sequence import StepPlan
from attn_service.step_runner import StepResult, StepRunner
from moe_core.errors import UnavailableError

KNOWN_TIMEOUT_S = 10.0
LOOK_S = 0.01


class PlacedRunner:
    """A StepRunner around another."""

    def __init__(self, runner: StepRunner, placements: Placements) -> None:
        self._runner = runner
        self._placements = placements

    async def execute(self, plan: StepPlan) -> StepResult:
        """See `StepRunner.execute`. Raises UnavailableError where the plan's placement does not
        come within KNOWN_TIMEOUT_S, which ends this process: its group cannot go on."""
        await self._until_known(plan.placement_epoch)
        with self._placements.in_use(plan.placement_epoch):
            return await self._runner.execute(plan)

    async def _until_known(self, epoch: int) -> None:
        deadline = asyncio.get_running_loop().time() + KNOWN_TIMEOUT_S
        while not self._placements.knows(epoch):
            if asyncio.get_running_loop().time() > deadline:
                raise UnavailableError(
                    f"a plan uses placement epoch {epoch}, which the gateway has not sent within "
                    f"{KNOWN_TIMEOUT_S:g} s; the newest here is {self._placements.newest.epoch}"
                )
            await asyncio.sleep(LOOK_S)
