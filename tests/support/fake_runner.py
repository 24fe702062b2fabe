"""A StepRunner without a model: the next token is a plain function of the tokens before it."""

import asyncio

import torch

from attn_service.engine import StepResult
from attn_service.sequence import StepPlan
from attn_service.step_times import StepTimes
from moe_core.errors import TransportError

VOCAB = 32


def next_token(tokens: list[int]) -> int:
    """What FakeRunner's logits favour after `tokens`."""
    return (sum(tokens) * 7 + len(tokens)) % VOCAB


def continuation(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeRunner:
    """Keeps what each block-table slot was given, as a KV cache would, so a token that was
    skipped, computed twice or written to another sequence's block changes the output."""

    def __init__(self, block_size: int = 4) -> None:
        self.block_size = block_size
        self.slots: dict[int, int] = {}
        self.plans: list[StepPlan] = []
        self.fail_next: TransportError | None = None
        self.gate: asyncio.Event | None = None

    async def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        if self.gate is not None:
            await self.gate.wait()
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        rows = []
        for part in plan.slices:
            end = part.num_computed_tokens + len(part.token_ids)
            for position, token in enumerate(part.token_ids, part.num_computed_tokens):
                self.slots[self._slot(part.block_table, position)] = token
            if part.needs_logits:
                tokens = [self.slots[self._slot(part.block_table, p)] for p in range(end)]
                rows.append(next_token(tokens))
        favoured = torch.tensor(rows, dtype=torch.int64)
        return StepResult(torch.nn.functional.one_hot(favoured, VOCAB).float(), StepTimes(steps=1))

    def _slot(self, block_table: tuple[int, ...], position: int) -> int:
        block = block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size
