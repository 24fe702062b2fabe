"""How near a tie an undisturbed run came: DESIGN section 6 lets a float32 run differ from it only
where a token or a router choice was won by less than MARGIN.

Knows where the model routes and where a step's logits come from; judges both by the plain formulas.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from torch import Tensor

from attn_service.model_runner import ModelRunner
from attn_service.sequence import SequenceRequest, StepPlan
from attn_service.step_runner import StepResult
from moe_core.config.model import MoeConfig
from moe_core.model import router
from support import plain_sampler
from support.plain_router import plain_route

MARGIN = 1e-5  # float32


@dataclass
class Margins:
    """Of one request that runs alone at a time: `of` takes it, and begins the next."""

    routers: list[float] = field(default_factory=list)
    logits: list[list[float]] = field(default_factory=list)

    def of(self, request: SequenceRequest, token_ids: tuple[int, ...]) -> float:
        """The least margin of its routers and of its tokens, which must be the plain formulas'."""
        least = min(self.routers)
        for position, row in enumerate(self.logits):
            before = token_ids[:position]
            token, margin = plain_sampler.next_token(
                row, request.sampling, request.prompt_ids, before
            )
            assert token == token_ids[position] or margin < MARGIN
            least = min(least, margin)
        assert len(self.logits) == len(token_ids)
        self.routers.clear()
        self.logits.clear()
        return least


@contextmanager
def recorded_margins() -> Iterator[Margins]:
    """Of all that is computed within, in this process."""
    margins = Margins()
    route, execute = router.route, ModelRunner.execute

    def routed(logits: Tensor, bias: Tensor | None, moe: MoeConfig) -> tuple[Tensor, Tensor]:
        plain_bias = None if bias is None else bias.double().tolist()
        margins.routers += (
            plain_route(row, plain_bias, moe).margin for row in logits.double().tolist()
        )
        return route(logits, bias, moe)

    async def executed(runner: ModelRunner, plan: StepPlan) -> StepResult:
        result = await execute(runner, plan)
        margins.logits += result.logits.double().tolist()
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(router, "route", routed)
        patched.setattr(ModelRunner, "execute", executed)
        yield margins
