"""A StepRunner without a model: the next token is a plain function of the tokens before it."""

import asyncio
import zlib
from collections.abc import Sequence

import torch

from attn_service.logprobs import logprobs_of
from attn_service.sequence import AskedLogprobs, StepPlan, TokenLogprobs
from attn_service.step_runner import StepResult
from attn_service.step_times import StepTimes
from moe_core.errors import TransportError

VOCAB = 32


def next_token(tokens: Sequence[int]) -> int:
    """What FakeRunner's logits favour after `tokens`."""
    return (sum(tokens) * 7 + len(tokens)) % VOCAB


def continuation(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeRunner:
    """Keeps what each block-table slot was given, as a KV cache would, so a token that was
    skipped, computed twice or written to another sequence's block changes the output.

    As in a model, what a slot holds depends on the tokens before it, so a block that is shared
    with a sequence that begins otherwise is an AssertionError, and so is a slot that is written
    while another slice of the step reads it.
    """

    def __init__(self, block_size: int = 4) -> None:
        self.block_size = block_size
        self.slots: dict[int, tuple[int, int]] = {}  # a token, digest of all up to it
        self.plans: list[StepPlan] = []
        self.fail_next: TransportError | None = None
        self.gate: asyncio.Event | None = None
        self.step_s = 0.0

    async def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        if self.gate is not None:
            await self.gate.wait()
        if self.step_s:
            await asyncio.sleep(self.step_s)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self._check_writes(plan)
        rows = []
        told = {}
        for index, part in enumerate(plan.slices):
            end = part.num_computed_tokens + len(part.token_ids)
            tokens = self._read(part.block_table, part.num_computed_tokens)
            for position, token in enumerate(part.token_ids, part.num_computed_tokens):
                tokens.append(token)
                slot = self._slot(part.block_table, position)
                self.slots[slot] = token, _digest(tokens)
            assert self._read(part.block_table, end) == tokens
            if part.asked_logprobs is not None:
                told[index] = _told(tokens[: part.num_computed_tokens + 1], part.asked_logprobs)
            if part.needs_logits:
                rows.append(next_token(tokens))
        return StepResult(_logits(rows), StepTimes(steps=1), told=told)

    def _check_writes(self, plan: StepPlan) -> None:
        written: list[int] = []
        read: set[int] = set()
        for part in plan.slices:
            first = part.num_computed_tokens
            read.update(self._slot(part.block_table, p) for p in range(first))
            new = range(first, first + len(part.token_ids))
            written += [self._slot(part.block_table, p) for p in new]
        assert len(written) == len(set(written))
        assert not read.intersection(written)

    def _read(self, block_table: tuple[int, ...], end: int) -> list[int]:
        tokens: list[int] = []
        for position in range(end):
            token, digest = self.slots[self._slot(block_table, position)]
            tokens.append(token)
            assert digest == _digest(tokens), f"position {position} of {block_table} is foreign"
        return tokens

    def _slot(self, block_table: tuple[int, ...], position: int) -> int:
        block = block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size


def _logits(favoured: Sequence[int]) -> torch.Tensor:
    rows = torch.tensor(favoured, dtype=torch.int64)
    return torch.nn.functional.one_hot(rows, VOCAB).float()


def _told(tokens: list[int], asked: AskedLogprobs) -> tuple[TokenLogprobs, ...]:
    favoured = []
    for following in asked.token_ids:
        favoured.append(next_token(tokens))
        tokens.append(following)
    counts = [asked.num_top] * len(favoured)
    return tuple(logprobs_of(_logits(favoured), counts, asked.token_ids))


def _digest(tokens: list[int]) -> int:
    return zlib.crc32(bytes(tokens))
