import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from attn_service.engine import Engine
from attn_service.kv_blocks import BlockPool
from attn_service.microbatches import ALWAYS_ONE, MicrobatchRule
from attn_service.scheduler import SchedulerConfig
from attn_service.sequence import FinishReason, Sampling, SequenceRequest
from attn_service.step_runner import StepResult
from attn_service.step_times import StepTimes
from moe_core.errors import PeerLostError, RequestError, UnavailableError
from support.fake_runner import VOCAB, FakeRunner, continuation
from support.small_engine import collect, running_engine

TIMEOUT_S = 5.0
NUM_BLOCKS = 32


def request(name: str, *prompt: int, **sampling: object) -> SequenceRequest:
    return SequenceRequest(name, prompt, Sampling(**{"max_tokens": 6, **sampling}))


@asynccontextmanager
async def running(
    runner: FakeRunner,
    *,
    budget: int = 8,
    num_blocks: int = NUM_BLOCKS,
    microbatches: MicrobatchRule = ALWAYS_ONE,
) -> AsyncIterator[Engine]:
    async with (
        running_engine(
            runner,
            budget=budget,
            num_blocks=num_blocks,
            placement_epoch=3,
            microbatches=microbatches,
        ) as engine,
        asyncio.timeout(TIMEOUT_S),
    ):
        yield engine


async def test_a_mixed_batch_gives_each_sequence_its_own_continuation() -> None:
    prompts = {"a": (1, 2, 3), "b": tuple(range(20)), "c": (9,), "d": (5, 5), "e": (8,) * 11}
    async with running(FakeRunner()) as engine:
        stream = engine.sequences.open_stream()
        for name, prompt in prompts.items():
            stream.add(request(name, *prompt))
        outputs = await collect(stream)
        assert outputs == {
            name: (continuation(prompt, 6), "length") for name, prompt in prompts.items()
        }
        assert engine.load.free_kv_blocks == NUM_BLOCKS


async def test_a_step_answers_each_stream_with_one_message() -> None:
    async with running(FakeRunner()) as engine:
        streams = [engine.sequences.open_stream(), engine.sequences.open_stream()]
        for stream, names in zip(streams, ("ab", "cd"), strict=True):
            for name in names:
                stream.add(request(name, 1, 2, max_tokens=1))
            stream.end_of_requests()
        for stream, names in zip(streams, ("ab", "cd"), strict=True):
            steps = [step async for step in stream.outputs()]
            assert [[o.sequence_id for o in step.outputs] for step in steps] == [[*names]]


async def test_a_late_arrival_joins_the_batch_of_the_next_step() -> None:
    runner = FakeRunner()
    async with running(runner) as engine:
        stream = engine.sequences.open_stream()
        stream.add(request("first", 1, 2, max_tokens=8))
        outputs = aiter(stream.outputs())
        await anext(outputs)
        stream.add(request("late", 3))
        await collect(stream)
    assert [len(plan.slices) for plan in runner.plans][:4] == [1, 2, 2, 2]


async def test_generation_stops_at_a_stop_token_which_is_put_out() -> None:
    expected = continuation((1, 2), 6)
    stop = expected[3]
    async with running(FakeRunner()) as engine:
        stream = engine.sequences.open_stream()
        stream.add(request("a", 1, 2, stop_token_ids=frozenset({stop})))
        outputs = await collect(stream)
    assert outputs["a"] == (expected[: expected.index(stop) + 1], "stop")


@pytest.mark.parametrize("prompt", [(VOCAB,), (1, -1)])
async def test_a_token_outside_the_vocabulary_is_refused(prompt: tuple[int, ...]) -> None:
    async with running(FakeRunner()) as engine:
        with pytest.raises(RequestError, match="outside the vocabulary of 32"):
            engine.sequences.open_stream().add(request("a", *prompt))


async def test_the_same_id_twice_on_one_stream_is_refused() -> None:
    async with running(FakeRunner()) as engine:
        stream = engine.sequences.open_stream()
        stream.add(request("a", 1))
        with pytest.raises(RequestError, match="already running"):
            stream.add(request("a", 2))


async def test_abort_during_a_step_frees_the_blocks_when_the_step_is_over() -> None:
    runner = FakeRunner()
    runner.gate = asyncio.Event()
    async with running(runner) as engine:
        stream = engine.sequences.open_stream()
        stream.add(request("gone", 1, 2))
        stream.add(request("stays", 3))
        while not runner.plans:
            await asyncio.sleep(0)
        stream.abort("gone")
        held = NUM_BLOCKS - engine.load.free_kv_blocks
        runner.gate.set()
        outputs = await collect(stream)
        assert held == 2  # the step under way still writes to them
        assert outputs == {
            "gone": ([], FinishReason.ABORT),
            "stays": (continuation((3,), 6), FinishReason.LENGTH),
        }
        assert engine.load.free_kv_blocks == NUM_BLOCKS
        assert [len(plan.slices) for plan in runner.plans[:2]] == [2, 1]


async def test_abort_of_a_waiting_or_unknown_sequence_is_no_error() -> None:
    runner = FakeRunner()
    runner.gate = asyncio.Event()
    async with running(runner) as engine:
        stream = engine.sequences.open_stream()
        for name in "abcde":
            stream.add(request(name, 1))
        while not runner.plans:
            await asyncio.sleep(0)
        assert (engine.load.num_running, engine.load.num_waiting) == (4, 1)
        stream.abort("e")
        stream.abort("never was")
        runner.gate.set()
        outputs = await collect(stream)
    assert outputs["e"] == ([], "abort")
    assert outputs["a"][1] == "length"


async def test_closing_a_stream_frees_all_its_sequences() -> None:
    async with running(FakeRunner()) as engine:
        kept, closed = engine.sequences.open_stream(), engine.sequences.open_stream()
        closed.add(request("a", 1, max_tokens=50))
        kept.add(request("b", 1))
        await anext(aiter(closed.outputs()))
        closed.close()
        assert (await collect(kept))["b"] == (continuation((1,), 6), "length")
        await asyncio.sleep(0)
        assert engine.load.free_kv_blocks == NUM_BLOCKS


async def test_a_step_that_the_experts_fail_ends_its_sequences_and_no_others() -> None:
    runner = FakeRunner()
    async with running(runner) as engine:
        stream = engine.sequences.open_stream()
        runner.fail_next = PeerLostError("layer 2 needs experts 3 of expert 1: lost")
        stream.add(request("a", 1, 2))
        failed = (await anext(aiter(stream.outputs()))).outputs[0]
        assert (failed.finish_reason, failed.error_code) == ("error", "UNAVAILABLE")
        assert failed.error == "layer 2 needs experts 3 of expert 1: lost"
        assert engine.load.free_kv_blocks == NUM_BLOCKS
        stream.add(request("a", 1, 2))
        assert (await collect(stream))["a"] == (continuation((1, 2), 6), "length")


async def test_a_plan_says_in_how_many_micro_batches_all_ranks_compute_it() -> None:
    runner = FakeRunner()
    async with running(runner, microbatches=MicrobatchRule(3)) as engine:
        stream = engine.sequences.open_stream()
        for name, max_tokens in (("a", 1), ("b", 2), ("c", 3)):
            stream.add(request(name, ord(name) % VOCAB, max_tokens=max_tokens))
        await collect(stream)
    assert [plan.num_microbatches for plan in runner.plans] == [3, 2, 1]


async def test_metrics_count_the_steps_that_were_completed_and_their_time() -> None:
    class Timed(FakeRunner):
        async def execute(self, plan):  # noqa: ANN001
            result = await super().execute(plan)
            await asyncio.sleep(0.002)
            times = StepTimes(steps=1, attention_s=0.001, expert_wait_s=0.0005)
            return replace(result, times=times)

    runner = Timed()
    async with running(runner) as engine:
        assert engine.metrics.steps == 0
        stream = engine.sequences.open_stream()
        runner.fail_next = PeerLostError("expert 0 is gone")
        stream.add(request("a", 1))
        await anext(aiter(stream.outputs()))
        stream.add(request("a", 1, max_tokens=3))
        await collect(stream)
        metrics = engine.metrics
    assert metrics.steps == 3
    assert metrics.step_s >= 3 * 0.002
    assert (metrics.attention_s, metrics.expert_wait_s) == pytest.approx((0.003, 0.0015))
    assert metrics.sampling_s > 0
    known = metrics.attention_s + metrics.expert_wait_s + metrics.sampling_s
    assert metrics.other_s == pytest.approx(metrics.step_s - known)


async def test_logits_that_are_not_finite_end_only_their_sequence() -> None:
    class Broken(FakeRunner):
        async def execute(self, plan):  # noqa: ANN001
            result = await super().execute(plan)
            result.logits[0] = float("nan")
            return result

    async with running(Broken()) as engine:
        stream = engine.sequences.open_stream()
        stream.add(request("bad", 1, 2, max_tokens=1))
        stream.add(request("good", 3, max_tokens=1))
        outputs = await collect(stream)
    assert outputs["bad"] == ([], "the logits for position 2 are not finite")
    assert outputs["good"] == (continuation((3,), 1), "length")


async def test_a_failure_that_is_not_the_experts_ends_everything_and_surfaces() -> None:
    class Lost(FakeRunner):
        async def execute(self, plan):  # noqa: ANN001
            raise UnavailableError("attention group lost tp_rank 1")

    engine = Engine(
        Lost(),
        BlockPool(8, 4),
        SchedulerConfig(2, 8, 16),
        vocab_size=VOCAB,
        placement_epoch=lambda: 0,
    )
    stream = engine.sequences.open_stream()
    stream.add(request("a", 1))
    with pytest.raises(UnavailableError, match="lost tp_rank 1"):
        await asyncio.wait_for(engine.run(), TIMEOUT_S)
    outputs = aiter(stream.outputs())
    (last,) = (await anext(outputs)).outputs
    assert (last.error_code, last.error) == ("UNAVAILABLE", "attention group lost tp_rank 1")
    with pytest.raises(UnavailableError, match="the engine has stopped"):
        await anext(outputs)
    with pytest.raises(UnavailableError, match="the engine has stopped"):
        engine.sequences.open_stream()


async def test_drain_ends_what_runs_and_takes_nothing_new() -> None:
    async with running(FakeRunner()) as engine:
        stream = engine.sequences.open_stream()
        stream.add(request("a", 1))
        draining = asyncio.create_task(engine.sequences.drain())
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="draining"):
            stream.add(request("b", 1))
        await draining
        assert engine.load.num_running == 0
        assert (await collect(stream))["a"][1] == "length"


async def test_an_idle_engine_does_not_wake_up() -> None:
    runner = FakeRunner()
    async with running(runner):
        await asyncio.sleep(0.05)
        assert runner.plans == []


async def test_every_plan_carries_the_placement_epoch_and_a_step_number_of_its_own() -> None:
    runner = FakeRunner()
    async with running(runner) as engine:
        stream = engine.sequences.open_stream()
        stream.add(request("a", 1))
        await collect(stream)
    assert {plan.placement_epoch for plan in runner.plans} == {3}
    assert [plan.step for plan in runner.plans] == list(range(1, len(runner.plans) + 1))


async def test_a_sequence_reports_with_its_first_token_what_was_cached() -> None:
    prompt = tuple(range(10))
    async with running(FakeRunner()) as engine:
        reported = []
        for name in "ab":
            stream = engine.sequences.open_stream()
            stream.add(request(name, *prompt, max_tokens=2))
            stream.end_of_requests()
            reported.append(
                [o.num_cached_tokens async for step in stream.outputs() for o in step.outputs]
            )
        assert reported == [[0, 0], [8, 0]]
        counters = engine.counters
    assert (counters.prefix_query_tokens, counters.prefix_hit_tokens) == (20, 8)


async def test_a_resumed_sequence_reports_no_more_cached_tokens_than_its_prompt_has() -> None:
    prompt, outputs = (1, 2, 3, 4, 5), tuple(continuation((1, 2, 3, 4, 5), 12))
    async with running(FakeRunner()) as engine:
        first = engine.sequences.open_stream()
        first.add(request("a", *prompt, max_tokens=12))
        await collect(first)
        resumed = engine.sequences.open_stream()
        sampling = Sampling(max_tokens=14)
        resumed.add(SequenceRequest("a", prompt, sampling, output_ids=outputs[:10]))
        resumed.end_of_requests()
        steps = [o async for step in resumed.outputs() for o in step.outputs]
    assert [o.token_ids for o in steps[:2]] == [(token,) for token in outputs[10:]]
    assert [o.num_cached_tokens for o in steps] == [5, 0, 0, 0]


async def test_priorities_decide_who_is_served_first() -> None:
    runner = FakeRunner()
    async with running(runner, num_blocks=4) as engine:  # one at a time
        stream = engine.sequences.open_stream()
        for name, priority in [("late", 1), ("normal", 0), ("first", -1)]:
            sampling = Sampling(max_tokens=1)
            prompt = (ord(name[0]) % VOCAB,) * 13
            stream.add(SequenceRequest(name, prompt, sampling, priority=priority))
        stream.end_of_requests()
        order = [o.sequence_id async for step in stream.outputs() for o in step.outputs]
    assert order == ["first", "normal", "late"]


async def test_preemption_changes_no_output_and_is_counted() -> None:
    prompts = {name: (index, 2, 3) for index, name in enumerate("abcd")}
    async with running(FakeRunner(), num_blocks=9) as engine:
        stream = engine.sequences.open_stream()
        for name, prompt in prompts.items():
            stream.add(request(name, *prompt, max_tokens=30))
        outputs = await collect(stream)
        counters = engine.counters
    assert outputs == {
        name: (continuation(prompt, 30), "length") for name, prompt in prompts.items()
    }
    assert counters.preemptions > 0
    assert counters.used_kv_blocks == 0
    assert counters.finished[FinishReason.LENGTH] == 4


@pytest.mark.parametrize("how", ["experts", "not finite"])
async def test_what_a_failed_sequence_has_computed_is_never_reused(how: str) -> None:
    class Failing(FakeRunner):
        async def execute(self, plan):  # noqa: ANN001
            result = await super().execute(plan)
            if len(self.plans) != 2:
                return result
            if how == "experts":
                raise PeerLostError("lost")
            return StepResult(result.logits * float("nan"), result.times)

    prompt = tuple(range(12))
    async with running(Failing()) as engine:
        first = engine.sequences.open_stream()
        first.add(request("a", *prompt))
        await collect(first)
        second = engine.sequences.open_stream()
        second.add(request("a", *prompt))
        assert (await collect(second))["a"] == (continuation(prompt, 6), "length")
        counters = engine.counters
    assert counters.prefix_hit_tokens == 0
    assert (counters.finished[FinishReason.ERROR], counters.finished[FinishReason.LENGTH]) == (1, 1)


async def test_finished_sequences_are_counted_by_reason() -> None:
    stop = continuation((1, 2), 1)[0]
    async with running(FakeRunner()) as engine:
        stream = engine.sequences.open_stream()
        stream.add(request("length", 3))
        stream.add(request("stop", 1, 2, stop_token_ids=frozenset({stop})))
        stream.add(request("abort", 4))
        stream.abort("abort")
        await collect(stream)
        finished = engine.counters.finished
    assert finished == {
        FinishReason.LENGTH: 1,
        FinishReason.STOP: 1,
        FinishReason.ABORT: 1,
        FinishReason.ERROR: 0,
        FinishReason.PARKED: 0,
    }
