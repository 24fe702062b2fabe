"""What the engine does with sequences that a step could not compute for want of an expert."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from attn_service.engine import Engine
from attn_service.sequence import Sampling, SequenceRequest, SequenceSlice, StepPlan
from attn_service.step_runner import StepResult
from support.fake_runner import FakeRunner, continuation
from support.small_engine import collect, running_engine

REASON = "layer 2 needs experts 3 of expert 1, which is gone; no other process holds them"
TIMEOUT_S = 5.0


class LossyRunner(FakeRunner):
    """Loses the slices that `loses` names; a lost slice's logits and cache are rubbish.

    computed: tokens computed in each step of the sequence that begins with some token."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: defaultdict[int, list[int]] = defaultdict(list)
        self.loses: Callable[[SequenceSlice], bool] = lambda part: False

    async def execute(self, plan: StepPlan) -> StepResult:
        result = await super().execute(plan)
        lost = {i: REASON for i, part in enumerate(plan.slices) if self.loses(part)}
        wanted = [i for i, part in enumerate(plan.slices) if part.needs_logits]
        logits = result.logits.clone()
        for part in plan.slices:
            first, _ = self.slots[self._slot(part.block_table, 0)]
            self.computed[first].append(len(part.token_ids))
        for row, index in enumerate(wanted):
            if index in lost:
                logits[row] = float("nan")
        for index in lost:
            part = plan.slices[index]
            for position in range(part.num_computed_tokens, _end(part)):
                self.slots[self._slot(part.block_table, position)] = -1, -1
        return replace(result, logits=logits, lost=lost)


def _end(part: SequenceSlice) -> int:
    return part.num_computed_tokens + len(part.token_ids)


def request(name: str, *prompt: int, max_tokens: int = 6) -> SequenceRequest:
    return SequenceRequest(name, prompt, Sampling(max_tokens=max_tokens))


async def test_what_is_lost_is_computed_again_and_the_others_go_on() -> None:
    runner = LossyRunner()
    prompts = {"a": (1, 2, 3), "b": (7,) * 20, "c": (9, 9)}
    there = asyncio.Event()
    runner.loses = lambda part: part.token_ids[0] == 7 and not there.is_set()
    async with running_engine(runner) as engine, asyncio.timeout(TIMEOUT_S):
        stream = engine.sequences.open_stream()
        for name, prompt in prompts.items():
            stream.add(request(name, *prompt))
        asyncio.get_running_loop().call_later(0.1, there.set)
        outputs = await collect(stream)
        assert outputs == {n: (continuation(p, 6), "length") for n, p in prompts.items()}
        assert engine.load.free_kv_blocks == engine.load.total_kv_blocks
    # No token of the others was computed twice; only the lost one's were.
    assert runner.computed[1] == [3, 1, 1, 1, 1, 1]
    assert runner.computed[9] == [2, 1, 1, 1, 1, 1]
    assert sum(runner.computed[7]) > 20 + 5


async def test_a_lost_decode_step_is_repeated_with_the_same_token() -> None:
    runner = LossyRunner()
    failing = iter([False, True, True, False, True] + [False] * 50)
    runner.loses = lambda part: next(failing)
    async with running_engine(runner) as engine, asyncio.timeout(TIMEOUT_S):
        stream = engine.sequences.open_stream()
        stream.add(request("a", 1, 2, 3))
        assert (await collect(stream))["a"] == (continuation((1, 2, 3), 6), "length")
        assert len(runner.plans) == 6 + 3
        assert engine.metrics.output_tokens == 6


async def test_waiting_ends_with_an_error_that_names_what_was_missing() -> None:
    runner = LossyRunner()
    runner.loses = lambda part: part.token_ids[0] == 5
    async with running_engine(runner, expert_wait_s=0.2) as engine, asyncio.timeout(TIMEOUT_S):
        stream = engine.sequences.open_stream()
        started = time.monotonic()
        stream.add(request("needs", 5))
        stream.add(request("other", 1, 2))
        outputs = await collect(stream)
        waited = time.monotonic() - started
        assert outputs["other"] == (continuation((1, 2), 6), "length")
        assert outputs["needs"][0] == []
        assert outputs["needs"][1].startswith(REASON)
        assert 0.2 <= waited < 1.2
        assert engine.load.free_kv_blocks == engine.load.total_kv_blocks


async def test_the_error_has_the_code_unavailable() -> None:
    runner = LossyRunner()
    runner.loses = lambda part: True
    async with running_engine(runner, expert_wait_s=0.05) as engine, asyncio.timeout(TIMEOUT_S):
        stream = engine.sequences.open_stream()
        stream.add(request("a", 5))
        (output,) = (await anext(aiter(stream.outputs()))).outputs
        assert (output.finish_reason, output.error_code) == ("error", "UNAVAILABLE")


async def test_time_without_an_expert_counts_only_while_nothing_advances() -> None:
    """Each token is lost for a while, together longer than expert_wait_s."""
    runner = LossyRunner()
    seen: dict[int, float] = {}

    def loses(part: SequenceSlice) -> bool:
        now = time.monotonic()
        return now < seen.setdefault(part.num_computed_tokens, now) + 0.1

    runner.loses = loses
    async with running_engine(runner, expert_wait_s=0.3) as engine, asyncio.timeout(TIMEOUT_S):
        stream = engine.sequences.open_stream()
        stream.add(request("a", 1, 2))
        assert (await collect(stream))["a"] == (continuation((1, 2), 6), "length")


async def test_blocked_sequences_are_tried_now_and_then_and_at_once_when_woken() -> None:
    runner = LossyRunner()
    runner.loses = lambda part: True
    async with running_engine(runner) as engine, asyncio.timeout(TIMEOUT_S):
        stream = engine.sequences.open_stream()
        stream.add(request("a", 1, 2))
        await asyncio.sleep(1.0)
        assert 3 <= len(runner.plans) < 20
        runner.loses = lambda part: False
        await asyncio.sleep(0)
        engine.wake()
        woken = time.monotonic()
        assert (await collect(stream))["a"] == (continuation((1, 2), 6), "length")
        assert time.monotonic() - woken < 0.2


async def test_a_blocked_sequence_can_be_aborted() -> None:
    runner = LossyRunner()
    runner.loses = lambda part: True
    async with running_engine(runner) as engine, asyncio.timeout(TIMEOUT_S):
        stream = engine.sequences.open_stream()
        stream.add(request("a", 1, 2))
        await asyncio.sleep(0.05)
        stream.abort("a")
        assert (await collect(stream))["a"] == ([], "abort")
        await _idle(engine)


async def test_those_that_begin_like_a_blocked_prompt_do_not_wait_for_it() -> None:
    """Else each would wait out its own time, one after the other."""
    runner = LossyRunner()
    runner.loses = lambda part: True
    prompt = tuple(range(12))
    async with running_engine(runner, expert_wait_s=0.5) as engine, asyncio.timeout(TIMEOUT_S):
        stream = engine.sequences.open_stream()
        for name in "abcd":
            stream.add(request(name, *prompt))
        started = time.monotonic()
        outputs = await collect(stream)
        assert time.monotonic() - started < 1.3  # one after the other it would be 2 s
        assert all(text.startswith(REASON) for _, text in outputs.values())


async def test_a_new_request_is_served_while_others_are_blocked() -> None:
    runner = LossyRunner()
    runner.loses = lambda part: part.token_ids[0] == 5
    async with running_engine(runner) as engine, asyncio.timeout(TIMEOUT_S):
        stream, other = engine.sequences.open_stream(), engine.sequences.open_stream()
        stream.add(request("needs", 5))
        await asyncio.sleep(0.3)
        other.add(request("a", 1, 2))
        started = time.monotonic()
        assert (await collect(other))["a"] == (continuation((1, 2), 6), "length")
        assert time.monotonic() - started < 0.3


async def _idle(engine: Engine) -> None:
    while engine.load.free_kv_blocks != engine.load.total_kv_blocks:
        await asyncio.sleep(0.01)


async def test_rows_of_the_sequences_that_are_kept_get_their_own_logits() -> None:
    runner = LossyRunner()
    runner.loses = lambda part: part.token_ids[0] in (5, 6) and part.num_computed_tokens == 0
    names = {"x": (5,), "a": (1, 2), "y": (6,), "b": (3, 4)}
    async with running_engine(runner, expert_wait_s=0.1) as engine, asyncio.timeout(TIMEOUT_S):
        stream = engine.sequences.open_stream()
        for name, prompt in names.items():
            stream.add(request(name, *prompt))
        outputs = await collect(stream)
    for name in "ab":
        assert outputs[name] == (continuation(names[name], 6), "length")
    assert all(outputs[name][1].startswith(REASON) for name in "xy")
