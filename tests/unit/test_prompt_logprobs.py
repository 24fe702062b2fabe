"""Logprobs of a prompt's own tokens: told once, whole, and never from the prefix cache."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_service import prompt_logprobs
from attn_service.follow import plan_from_pb, plan_to_pb
from attn_service.logprobs import token_logprobs
from attn_service.sequence import (
    AskedLogprobs,
    Sampling,
    SequenceOutput,
    SequenceRequest,
    SequenceSlice,
    StepPlan,
)
from attn_service.step_runner import StepResult
from support.fake_runner import VOCAB, FakeRunner, continuation, next_token
from support.small_engine import outputs_of, running_engine

PROMPT = tuple((7 * n + 3) % VOCAB for n in range(21))
ASKED = Sampling(max_tokens=4, prompt_logprobs=2)


def check_told(output: SequenceOutput, prompt: tuple[int, ...], num_top: int = 2) -> None:
    """Against log_softmax of what FakeRunner favours."""
    assert [each.token_id for each in output.prompt_logprobs] == list(prompt[1:])
    for end, each in enumerate(output.prompt_logprobs, 1):
        logits = torch.zeros(VOCAB)
        logits[next_token(prompt[:end])] = 1.0
        expected = logits.log_softmax(-1)
        assert each.logprob == pytest.approx(expected[each.token_id].item(), abs=1e-6)
        assert len(each.top_token_ids) == num_top
        assert num_top == 0 or each.top_token_ids[0] == next_token(prompt[:end])


@pytest.mark.parametrize("budget", [4, 5, 8, 64])
async def test_all_of_a_prompt_is_told_with_the_first_token_whatever_the_chunks(
    budget: int,
) -> None:
    others = [SequenceRequest(f"other {n}", PROMPT[n:], Sampling(max_tokens=9)) for n in (2, 5)]
    async with running_engine(FakeRunner(), budget=budget) as engine:
        first, *rest = (await outputs_of(engine, SequenceRequest("a", PROMPT, ASKED), *others))["a"]
    check_told(first, PROMPT)
    assert first.token_ids == (next_token(PROMPT),)
    assert [output.prompt_logprobs for output in rest] == [()] * 3


async def test_a_prompt_alone_is_told_without_a_token() -> None:
    sampling = Sampling(max_tokens=0, prompt_logprobs=0)
    runner = FakeRunner()
    async with running_engine(runner) as engine:
        asked = SequenceRequest("a", PROMPT, sampling), SequenceRequest("one", (5,), sampling)
        outputs = await outputs_of(engine, *asked)
    (only,) = outputs["a"]
    check_told(only, PROMPT, num_top=0)
    assert (only.token_ids, only.finish_reason) == ((), "length")
    assert outputs["one"] == [replace(outputs["one"][0], prompt_logprobs=(), token_ids=())]
    assert not any(part.needs_logits for plan in runner.plans for part in plan.slices)


async def test_what_is_cached_of_a_prompt_is_computed_again_to_be_told() -> None:
    async with running_engine(FakeRunner(), budget=32) as engine:
        await outputs_of(engine, SequenceRequest("before", PROMPT, Sampling(max_tokens=1)))
        (told, *_) = (await outputs_of(engine, SequenceRequest("a", PROMPT, ASKED)))["a"]
        plain = SequenceRequest("after", PROMPT, Sampling(max_tokens=1))
        (after,) = (await outputs_of(engine, plain))["after"]
    check_told(told, PROMPT)
    assert (told.num_cached_tokens, after.num_cached_tokens) == (0, 20)


async def test_a_prompt_that_is_preempted_half_told_is_told_once() -> None:
    """The first sequence takes the last block when the second has 12 of its 15 tokens."""
    first = SequenceRequest("first", PROMPT, Sampling(max_tokens=24))
    asks = SequenceRequest("asks", PROMPT[:15][::-1], ASKED)
    runner = FakeRunner()
    async with running_engine(runner, budget=2, num_blocks=12, max_num_seqs=2) as engine:
        outputs = (await outputs_of(engine, first, asks))["asks"]
    parts = [part for plan in runner.plans for part in plan.slices if part.asked_logprobs]
    assert [part.num_computed_tokens for part in parts].count(0) == 2
    check_told(outputs[0], asks.prompt_ids)
    assert not any(output.prompt_logprobs for output in outputs[1:])


async def test_preemption_after_the_prompt_neither_loses_nor_doubles_what_is_told() -> None:
    sampling = Sampling(max_tokens=20, prompt_logprobs=2)
    requests = [SequenceRequest(str(n), PROMPT[n:], sampling) for n in range(4)]
    async with running_engine(FakeRunner(), budget=5, num_blocks=15) as engine:
        outputs = await outputs_of(engine, *requests)
        preemptions = engine.counters.preemptions
    assert preemptions > 0
    for request in requests:
        first, *rest = outputs[request.sequence_id]
        check_told(first, request.prompt_ids)
        assert not any(output.prompt_logprobs for output in rest)
        tokens = [token for output in (first, *rest) for token in output.token_ids]
        assert tokens == continuation(request.prompt_ids, 20)


async def test_a_sequence_that_was_resumed_is_not_told_its_prompt_again() -> None:
    request = SequenceRequest("a", PROMPT, ASKED, output_ids=(next_token(PROMPT),))
    runner = FakeRunner()
    async with running_engine(runner) as engine:
        outputs = (await outputs_of(engine, request))["a"]
    assert not any(output.prompt_logprobs for output in outputs)
    assert not any(part.asked_logprobs for plan in runner.plans for part in plan.slices)


@pytest.mark.parametrize("max_tokens", [0, 4])
async def test_logits_that_are_not_finite_end_the_sequence_and_say_where(max_tokens: int) -> None:
    class Broken(FakeRunner):
        async def execute(self, plan: StepPlan) -> StepResult:
            result = await super().execute(plan)
            (told,) = result.told.values()
            wrong = (told[0], replace(told[1], logprob=math.nan), *told[2:])
            return replace(result, told={0: wrong})

    sampling = replace(ASKED, max_tokens=max_tokens)
    async with running_engine(Broken(), budget=32) as engine:
        (only,) = (await outputs_of(engine, SequenceRequest("a", PROMPT, sampling)))["a"]
    assert (only.finish_reason, only.error_code) == ("error", "INTERNAL")
    assert "position 2" in only.error


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_pieces_of_the_logits_tell_what_all_at_once_would(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    weight = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(3))
    rows = torch.randn(7, 8, generator=torch.Generator().manual_seed(4))
    calls: list[int] = []

    def head(part: Tensor) -> Tensor:
        calls.append(len(part))
        return part @ weight

    monkeypatch.setattr(prompt_logprobs, "LOGITS_BYTES", rows_at_once * VOCAB * 4)
    asked = [AskedLogprobs((1, 2, 3), 0), AskedLogprobs((4,), 3), AskedLogprobs((5, 6, 7), 1)]
    told = prompt_logprobs.tell(rows, asked, head, VOCAB)
    assert max(calls) <= rows_at_once
    assert sum(calls) == len(rows)
    assert [len(each) for each in told] == [3, 1, 3]
    expected = token_logprobs(rows @ weight, [0, 0, 0, 3, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7])
    for each, wanted in zip((each for part in told for each in part), expected, strict=True):
        assert wanted is not None
        assert (each.token_id, each.rank) == (wanted.token_id, wanted.rank)
        assert each.top_token_ids == wanted.top_token_ids
        assert each.logprob == pytest.approx(wanted.logprob, abs=1e-6)


def test_followers_are_told_which_rows_to_make_logits_of() -> None:
    asked = AskedLogprobs((4, 5), 20)
    slices = (
        SequenceSlice((1, 2, 3), 0, (7,), needs_logits=True, asked_logprobs=asked),
        SequenceSlice((9,), 3, (8,), needs_logits=False),
    )
    plan = StepPlan(3, 1, slices, 2)
    assert plan_from_pb(plan_to_pb(plan)) == plan
