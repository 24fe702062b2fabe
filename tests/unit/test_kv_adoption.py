"""Sequences that leave one engine for another with their KV blocks; the model is faked."""

import asyncio
import random
from collections.abc import AsyncIterator
from collections.abc import Sequence as Many
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import pytest

from attn_service import adoptions
from attn_service.adoptions import StillWritingError
from attn_service.engine import Engine
from attn_service.engine_stream import EngineStream
from attn_service.sequence import (
    FinishReason,
    Sampling,
    SequenceOutput,
    SequenceRequest,
    StepOutput,
)
from moe_core.errors import EpserveError, PeerLostError, RequestError
from moe_core.parked_kv import KvSource, ParkedKv
from support.fake_runner import FakeRunner, continuation
from support.small_engine import running_engine

PROMPT = tuple(range(1, 11))
REQUEST = SequenceRequest("owner/r/0", PROMPT, Sampling(max_tokens=12, seed=7))
BLOCKS = 64


@dataclass
class Fetcher:
    """Copies what FakeRunner keeps for a cache. `mistake`: what goes wrong, and when."""

    giver: Engine
    there: FakeRunner
    here: FakeRunner
    mistake: str = ""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fetched: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    async def fetch(
        self, sequence_id: str, source: KvSource, first: int, blocks: Many[int], timeout_s: float
    ) -> None:
        self.fetched.append(len(blocks))
        await self.gate.wait()
        if self.mistake == "still writing":
            raise StillWritingError("a rank does not answer")
        if self.mistake == "lost before":
            raise PeerLostError("the other group is gone")
        size = self.there.block_size
        for given, own in zip(source.parked.block_ids[first:], blocks, strict=False):
            for slot in range(size):
                value = self.there.slots.get(given * size + slot)
                if value is not None:
                    self.here.slots[own * size + slot] = value
            if self.mistake == "lost midway":
                raise PeerLostError("the other group is gone")
        kept = self.giver.sequences.parked.release(sequence_id)
        if not kept or self.mistake == "not kept":
            raise EpserveError("the blocks were not kept")

    async def release(self, sequence_id: str, source: KvSource) -> None:
        if self.mistake:
            raise PeerLostError("the other group is gone")
        self.giver.sequences.parked.release(sequence_id)


@dataclass
class Pair:
    giver: Engine
    taker: Engine
    there: FakeRunner
    here: FakeRunner
    fetcher: Fetcher

    def computed(self) -> int:
        plans = [*self.there.plans, *self.here.plans]
        return sum(len(part.token_ids) for plan in plans for part in plan.slices)

    @property
    def moved(self) -> tuple[int, int]:
        return self.taker.metrics.handed_over_tokens, self.taker.metrics.recomputed_tokens

    async def all_blocks_free(self) -> None:
        self.giver.sequences.parked.release_all()
        for engine in (self.giver, self.taker):
            async with asyncio.timeout(5):
                while engine.load.num_running + engine.load.num_waiting:
                    await asyncio.sleep(0.001)
            assert engine.load.free_kv_blocks == engine.load.total_kv_blocks


class Engines:
    """A context manager of a Pair."""

    def __init__(self, **taker: int) -> None:
        self._taker = taker
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Pair:
        there, here = FakeRunner(), FakeRunner()
        giver = await self._stack.enter_async_context(running_engine(there, num_blocks=BLOCKS))
        fetcher = Fetcher(giver, there, here)
        engine = running_engine(here, kv_fetcher=fetcher, **self._taker)
        taker = await self._stack.enter_async_context(engine)
        return Pair(giver, taker, there, here, fetcher)

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()


async def park_after(
    engine: Engine, request: SequenceRequest, count: int
) -> tuple[list[int], ParkedKv | None]:
    """The tokens until the engine lets go of a sequence that is to leave after `count` of them, and
    what it keeps; None where it ended before."""
    stream = engine.sequences.open_stream()
    stream.add(request)
    tokens: list[int] = []
    if count == 0:
        stream.park(request.sequence_id)
    async for step in stream.outputs():
        for output in step.outputs:
            tokens.extend(output.token_ids)
            if output.finish_reason is not None:
                stream.close()
                return tokens, output.parked
        if len(tokens) >= count:
            stream.park(request.sequence_id)
    raise AssertionError("no last output came")


def moved(request: SequenceRequest, tokens: Many[int], parked: ParkedKv) -> SequenceRequest:
    source = KvSource(0, 1, parked)
    return replace(request, output_ids=tuple(tokens), take_over=True, kv_source=source)


async def rest_of(stream: EngineStream) -> tuple[list[int], SequenceOutput]:
    stream.end_of_requests()
    async with asyncio.timeout(5):
        outputs = [output async for step in stream.outputs() for output in step.outputs]
    return [token for output in outputs for token in output.token_ids], outputs[-1]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 11])
async def test_a_parked_sequence_goes_on_with_no_token_computed_twice(count: int) -> None:
    async with Engines() as pair:
        tokens, parked = await park_after(pair.giver, REQUEST, count)
        assert parked is not None
        stream = pair.taker.sequences.open_stream()
        stream.add(moved(REQUEST, tokens, parked))
        rest, last = await rest_of(stream)
        assert tokens + rest == continuation(PROMPT, 12)
        assert last.finish_reason is FinishReason.LENGTH
        assert pair.computed() == len(PROMPT) + 11
        assert pair.moved == (parked.num_tokens, 0)
        # The last token has been told, and is yet to be computed.
        assert parked.num_tokens == (len(PROMPT) + len(tokens) - 1 if tokens else 0)
        assert pair.giver.load.free_kv_blocks == BLOCKS
        await pair.all_blocks_free()


async def test_a_prompt_goes_on_in_the_middle() -> None:
    request = replace(REQUEST, prompt_ids=tuple(range(20)))
    async with Engines() as pair:
        pair.there.step_s = 0.02
        stream = pair.giver.sequences.open_stream()
        stream.add(request)
        while not pair.there.plans:
            await asyncio.sleep(0.001)
        stream.park(request.sequence_id)
        (step,) = [each async for each in _until_end(stream)]
        parked = step.outputs[0].parked
        assert parked is not None
        assert (parked.num_tokens, len(parked.block_ids)) == (8, 2)
        taking = pair.taker.sequences.open_stream()
        taking.add(moved(request, (), parked))
        rest, _ = await rest_of(taking)
        assert rest == continuation(request.prompt_ids, 12)
        assert pair.computed() == 20 + 11


async def _until_end(stream: EngineStream) -> AsyncIterator[StepOutput]:
    async for step in stream.outputs():
        yield step
        if step.outputs[-1].finish_reason is not None:
            return


async def test_what_choices_share_is_brought_once_and_found_by_later_requests() -> None:
    async with Engines(num_blocks=BLOCKS) as pair:
        stream = pair.taker.sequences.open_stream()
        for index in range(2):
            request = replace(
                REQUEST,
                sequence_id=f"owner/r/{index}",
                sampling=replace(REQUEST.sampling, index=index),
            )
            tokens, parked = await park_after(pair.giver, request, 2)
            assert parked is not None
            stream.add(moved(request, tokens, parked))
        rest, _ = await rest_of(stream)
        assert sorted(rest) == sorted(2 * continuation(PROMPT, 12)[2:])
        first, second = pair.fetcher.fetched
        assert second == first - len(PROMPT) // 4
        later = pair.taker.sequences.open_stream()
        later.add(replace(REQUEST, sequence_id="later"))
        async for step in later.outputs():
            assert step.outputs[0].num_cached_tokens == 8
            break
        later.close()
        await pair.all_blocks_free()


@pytest.mark.parametrize("mistake", ["lost before", "lost midway", "not kept"])
async def test_what_cannot_be_had_is_computed_again_and_counted(mistake: str) -> None:
    async with Engines() as pair:
        tokens, parked = await park_after(pair.giver, REQUEST, 3)
        assert parked is not None
        pair.fetcher.mistake = mistake
        stream = pair.taker.sequences.open_stream()
        stream.add(moved(REQUEST, tokens, parked))
        rest, _ = await rest_of(stream)
        assert tokens + rest == continuation(PROMPT, 12)
        assert pair.moved == (0, parked.num_tokens)
        await pair.all_blocks_free()


async def test_a_rank_that_may_write_yet_ends_the_group_and_others_go_on() -> None:
    async with Engines() as pair:
        tokens, parked = await park_after(pair.giver, REQUEST, 3)
        assert parked is not None
        pair.fetcher.mistake = "still writing"
        stream = pair.taker.sequences.open_stream()
        stream.add(moved(REQUEST, tokens, parked))
        outputs = stream.outputs()
        told = await asyncio.wait_for(anext(outputs), 5)
        assert [output.go_elsewhere for output in told.outputs] == [True]
        with pytest.raises(EpserveError, match="a rank does not answer"):
            await anext(outputs)
        assert pair.taker.load.free_kv_blocks == BLOCKS - len(parked.block_ids)


async def test_blocks_that_nobody_fetches_are_freed_after_a_while() -> None:
    async with Engines() as pair:
        pair.giver.sequences.parked._keep_s = 0.05
        tokens, parked = await park_after(pair.giver, REQUEST, 3)
        assert parked is not None
        draining = asyncio.create_task(pair.giver.sequences.drain())
        await asyncio.sleep(0.01)
        assert not draining.done()
        await asyncio.wait_for(draining, 5)
        assert pair.giver.load.free_kv_blocks == BLOCKS
        stream = pair.taker.sequences.open_stream()
        stream.add(moved(REQUEST, tokens, parked))
        assert tokens + (await rest_of(stream))[0] == continuation(PROMPT, 12)
        assert pair.moved == (0, parked.num_tokens)


async def test_no_room_means_computing_and_the_other_group_need_not_wait() -> None:
    async with Engines(max_num_seqs=1) as pair:
        pair.here.step_s = 0.005
        stream = pair.taker.sequences.open_stream()
        stream.add(SequenceRequest("first", (3, 4, 5), Sampling(max_tokens=20)))
        while not pair.here.plans:
            await asyncio.sleep(0.001)
        tokens, parked = await park_after(pair.giver, REQUEST, 3)
        assert parked is not None
        stream.add(moved(REQUEST, tokens, parked))
        rest, _ = await rest_of(stream)
        assert sorted(rest) == sorted(continuation((3, 4, 5), 20) + continuation(PROMPT, 12)[3:])
        assert pair.moved == (0, parked.num_tokens)
        assert not pair.giver.sequences.parked._parked


async def test_a_turn_that_comes_too_late_means_computing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adoptions, "ADOPT_S", 0.0)
    async with Engines() as pair:
        tokens, parked = await park_after(pair.giver, REQUEST, 3)
        assert parked is not None
        stream = pair.taker.sequences.open_stream()
        stream.add(moved(REQUEST, tokens, parked))
        assert tokens + (await rest_of(stream))[0] == continuation(PROMPT, 12)
        assert pair.moved == (0, parked.num_tokens)


async def test_a_prompt_whose_logprobs_are_to_be_told_keeps_no_blocks() -> None:
    asked = replace(REQUEST, sampling=replace(REQUEST.sampling, prompt_logprobs=0))
    async with Engines() as pair:
        pair.there.step_s = 0.02
        tokens, parked = await park_after(pair.giver, asked, 0)
        assert (tokens, parked) == ([], ParkedKv(0, ()))
        await pair.all_blocks_free()


async def test_one_that_ends_while_it_is_to_leave_has_ended() -> None:
    async with Engines() as pair:
        tokens, parked = await park_after(pair.giver, REQUEST, 12)
        assert (tokens, parked) == (continuation(PROMPT, 12), None)


async def test_a_request_that_can_never_run_is_refused() -> None:
    async with Engines() as pair:
        stream = pair.taker.sequences.open_stream()
        wrong = replace(REQUEST, sampling=Sampling(max_tokens=1000))
        with pytest.raises(RequestError, match="the context holds 64"):
            stream.add(moved(wrong, (), ParkedKv(4, (0,))))
        assert pair.taker.load.num_waiting == 0


async def test_a_taker_that_has_no_fetcher_computes() -> None:
    async with running_engine(FakeRunner()) as engine:
        stream = engine.sequences.open_stream()
        stream.add(moved(REQUEST, continuation(PROMPT, 12)[:3], ParkedKv(12, (0, 1, 2))))
        assert (await rest_of(stream))[0] == continuation(PROMPT, 12)[3:]
        assert engine.metrics.recomputed_tokens == 12


@pytest.mark.parametrize("seed", range(20))
async def test_no_block_is_lost_whatever_fails_and_whoever_leaves(seed: int) -> None:
    """Sequences move while others run; hand-overs fail at any point, and some are aborted."""
    chance = random.Random(seed)
    async with Engines(num_blocks=chance.choice([12, 64])) as pair:
        stream = pair.taker.sequences.open_stream()
        names = set()
        for number in range(6):
            prompt = tuple(chance.randrange(32) for _ in range(chance.randint(1, 12)))
            name = f"owner/{number}/0"
            request = SequenceRequest(name, prompt, Sampling(max_tokens=chance.randint(1, 10)))
            tokens, parked = await park_after(pair.giver, request, chance.randint(0, 6))
            if parked is None:
                continue
            pair.fetcher.mistake = chance.choice(["", "", "lost before", "lost midway", "not kept"])
            pair.fetcher.gate.clear()
            stream.add(moved(request, tokens, parked))
            names.add(name)
            match chance.choice(["fetch", "fetch", "abort", "park", "leave"]):
                case "abort":
                    await asyncio.sleep(chance.choice([0, 0.002]))
                    stream.abort(name)
                case "park":
                    await asyncio.sleep(chance.choice([0, 0.002]))
                    stream.park(name)
                case "leave":
                    await asyncio.sleep(0.001)
            pair.fetcher.gate.set()
            await asyncio.sleep(chance.choice([0, 0.003]))
        if names:
            await rest_of(stream)
        pair.taker.sequences.parked.release_all()
        await pair.all_blocks_free()


async def test_an_engine_that_fails_frees_nothing_twice_and_tells_those_on_their_way() -> None:
    async with Engines() as pair:
        tokens, parked = await park_after(pair.giver, REQUEST, 3)
        assert parked is not None
        pair.fetcher.gate.clear()
        stream = pair.taker.sequences.open_stream()
        stream.add(moved(REQUEST, tokens, parked))
        await asyncio.sleep(0.005)
        pair.taker.sequences.fail(PeerLostError("a rank is gone"))
        outputs = stream.outputs()
        told = await anext(outputs)
        assert [output.go_elsewhere for output in told.outputs] == [True]
        with pytest.raises(EpserveError, match="a rank is gone"):
            await anext(outputs)
        await asyncio.sleep(0.005)
        assert pair.taker.load.free_kv_blocks == BLOCKS
