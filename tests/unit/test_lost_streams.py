"""A requester that is lost without a word, and who takes over what it had running."""

import asyncio
from dataclasses import replace

import pytest

from attn_service.ended_sequences import EndedSequences
from attn_service.engine import Engine
from attn_service.engine_stream import EngineStream
from attn_service.sequence import (
    FinishReason,
    Sampling,
    Sequence,
    SequenceOutput,
    SequenceRequest,
)
from moe_core.errors import RequestError, UnavailableError
from support.fake_runner import FakeRunner, continuation
from support.small_engine import running_engine

PROMPT = (1, 2, 3)
EXPECTED = continuation(PROMPT, 12)
REQUEST = SequenceRequest("owner/r/0", PROMPT, Sampling(max_tokens=12, seed=7))
AGAIN = replace(REQUEST, take_over=True)


async def tokens_until(stream: EngineStream, count: int) -> list[int]:
    """At least so many, of the first that come."""
    found: list[int] = []
    async for step in stream.outputs():
        for output in step.outputs:
            found.extend(output.token_ids)
        if len(found) >= count:
            break
    return found


async def all_of(stream: EngineStream) -> tuple[list[int], SequenceOutput]:
    stream.end_of_requests()
    outputs = [output async for step in stream.outputs() for output in step.outputs]
    return [token for output in outputs for token in output.token_ids], outputs[-1]


async def lost_after(engine: Engine, count: int, request: SequenceRequest = REQUEST) -> list[int]:
    """A stream that is lost when so many tokens were read from it; those tokens."""
    stream = engine.sequences.open_stream()
    stream.add(request)
    found = await tokens_until(stream, count)
    stream.lose()
    return found


async def until_idle(engine: Engine) -> None:
    async with asyncio.timeout(5):
        while engine.load.num_running + engine.load.num_waiting:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("received", [0, 2])
async def test_a_successor_gets_exactly_the_tokens_after_those_it_has(received: int) -> None:
    runner = FakeRunner()
    async with running_engine(runner) as engine:
        await lost_after(engine, 4)
        stream = engine.sequences.open_stream()
        stream.add(replace(AGAIN, output_ids=tuple(EXPECTED[:received])))
        tokens, last = await all_of(stream)
    assert tokens == EXPECTED[received:]
    assert last.finish_reason is FinishReason.LENGTH
    assert sum(len(part.token_ids) for plan in runner.plans for part in plan.slices) == 14
    assert engine.load.free_kv_blocks == 64


async def test_orphans_are_aborted_and_their_blocks_freed_after_the_grace() -> None:
    async with running_engine(FakeRunner(), orphan_grace_s=0.05) as engine:
        runner = engine._runner
        await lost_after(engine, 1)
        runner.gate = asyncio.Event()  # it would end before the grace does
        await asyncio.sleep(0.1)
        runner.gate.set()
        await until_idle(engine)
        assert engine.counters.finished[FinishReason.ABORT] == 1
        assert engine.load.free_kv_blocks == 64
        assert engine.sequences.find("owner/r/0") is None
        assert not engine.sequences._streams


async def test_no_grace_at_all_aborts_at_once() -> None:
    async with running_engine(FakeRunner(), orphan_grace_s=0.0) as engine:
        await lost_after(engine, 1)
        await until_idle(engine)
        assert engine.sequences.find("owner/r/0") is None


async def test_one_that_ended_just_now_is_told_whole() -> None:
    async with running_engine(FakeRunner()) as engine:
        await lost_after(engine, 4)
        await until_idle(engine)
        stream = engine.sequences.open_stream()
        stream.add(AGAIN)
        tokens, last = await all_of(stream)
    assert (tokens, last.finish_reason) == (EXPECTED, FinishReason.LENGTH)


async def test_logprobs_of_tokens_that_were_lost_on_the_way_are_told_again() -> None:
    asked = replace(REQUEST, sampling=replace(REQUEST.sampling, logprobs=0))
    async with running_engine(FakeRunner()) as engine:
        await lost_after(engine, 4, asked)
        stream = engine.sequences.open_stream()
        stream.add(replace(asked, take_over=True, output_ids=tuple(EXPECTED[:2])))
        stream.end_of_requests()
        outputs = [output async for step in stream.outputs() for output in step.outputs]
    told = [each.token_id for output in outputs for each in output.logprobs]
    assert told == EXPECTED[2:]


async def test_logprobs_that_another_process_has_told_are_generated_anew() -> None:
    """The tokens are known, but not what the model thought of them."""
    asked = replace(REQUEST, sampling=replace(REQUEST.sampling, logprobs=0))
    async with running_engine(FakeRunner()) as engine:
        await lost_after(engine, 1, replace(asked, output_ids=tuple(EXPECTED[:3])))
        stream = engine.sequences.open_stream()
        stream.add(replace(asked, take_over=True))
        stream.end_of_requests()
        outputs = [output async for step in stream.outputs() for output in step.outputs]
        assert engine.counters.finished[FinishReason.ABORT] == 1
    assert [each.token_id for output in outputs for each in output.logprobs] == EXPECTED


async def test_one_that_is_here_no_more_begins_anew() -> None:
    async with running_engine(FakeRunner()) as engine:
        stream = engine.sequences.open_stream()
        stream.add(replace(AGAIN, output_ids=tuple(EXPECTED[:5])))
        tokens, _ = await all_of(stream)
    assert tokens == EXPECTED[5:]


async def test_whoever_still_reads_is_told_that_another_has_taken_over() -> None:
    runner = FakeRunner()
    async with running_engine(runner) as engine:
        first, second = engine.sequences.open_stream(), engine.sequences.open_stream()
        first.add(REQUEST)
        runner.gate = asyncio.Event()
        await asyncio.sleep(0.01)
        second.add(AGAIN)
        runner.gate.set()
        assert (await all_of(first))[1].finish_reason is FinishReason.ABORT
        assert (await all_of(second))[0] == EXPECTED


async def test_an_id_that_runs_for_another_is_refused_without_taking_over() -> None:
    async with running_engine(FakeRunner()) as engine:
        first, second = engine.sequences.open_stream(), engine.sequences.open_stream()
        first.add(REQUEST)
        with pytest.raises(RequestError, match="'owner/r/0': already running"):
            second.add(REQUEST)
        assert (await all_of(first))[0] == EXPECTED


async def test_an_id_that_only_an_orphan_has_is_free() -> None:
    async with running_engine(FakeRunner()) as engine:
        await lost_after(engine, 2)
        stream = engine.sequences.open_stream()
        other = replace(REQUEST, prompt_ids=(9, 9))
        stream.add(other)
        assert (await all_of(stream))[0] == continuation((9, 9), 12)
        assert engine.counters.finished[FinishReason.ABORT] == 1
        assert not engine.sequences._streams - {stream}


@pytest.mark.parametrize("field", ["prompt_ids", "sampling"])
async def test_another_request_of_the_same_id_takes_over_nothing(field: str) -> None:
    other = {"prompt_ids": (9,), "sampling": Sampling(max_tokens=3)}
    async with running_engine(FakeRunner()) as engine:
        await lost_after(engine, 2)
        with pytest.raises(RequestError, match=f"{field}: sequence_id='owner/r/0' was begun"):
            engine.sequences.open_stream().add(replace(AGAIN, **{field: other[field]}))
        assert engine.sequences.find("owner/r/0") is not None


async def test_a_draining_engine_still_hands_over_what_it_has() -> None:
    async with running_engine(FakeRunner()) as engine:
        await lost_after(engine, 2)
        stream = engine.sequences.open_stream()
        draining = asyncio.create_task(engine.sequences.drain())
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="draining"):
            stream.add(replace(AGAIN, sequence_id="owner/r/1"))
        stream.add(AGAIN)
        assert (await all_of(stream))[0] == EXPECTED
        await draining


def test_ended_sequences_are_remembered_for_their_time_and_no_longer() -> None:
    now = 0.0
    ended = EndedSequences(5.0, lambda: now)
    for second, name in enumerate("abc"):
        now = float(second)
        request = replace(REQUEST, sequence_id=name)
        ended.put(Sequence(request), FinishReason.STOP)
    now = 5.5
    assert ended.find("a") is None
    assert len(ended) == 2
    found = ended.find("b")
    assert found is not None
    assert found[1] is FinishReason.STOP
    ended.forget("b")
    assert ended.find("b") is None
