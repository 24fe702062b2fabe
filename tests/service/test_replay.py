"""Streams that outlive the group that they run on, lost or leaving, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from gateway.metrics.requests import RequestMetrics
from gateway.running import MAX_LOSSES
from moe_core.cluster import MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from moe_core.pb.epserve.v1 import logprobs_pb2
from support.fake_attention import FakeAttention, FakeWorker
from support.small_gateway import SmallGateway
from support.words import WORDS, word_tokenizer

DEADLINE_S = 10
TWO_GROUPS = ParallelConfig(attn_devices=2, dp_size=2)
TOKENS = [7, 8, 9, 10, 11]


def count_up(prompt: Sequence[int]) -> list[int]:
    return [prompt[-1] + step for step in range(1, 6)]


class Tier:
    """Two groups of a gateway. A request goes to the first, which pauses."""

    def __init__(self, gateway: SmallGateway, metrics: RequestMetrics) -> None:
        self.gateway = gateway
        self._metrics = metrics
        self.fakes = [FakeAttention(count_up), FakeAttention(count_up)]
        self.workers: list[FakeWorker] = []
        self.first, self.second = self.fakes

    @property
    def moves(self) -> float | None:
        """As a scrape shows them."""
        labels = {"model_name": "small"}
        return self._metrics.registry.get_sample_value("epserve_request_moves_total", labels)

    async def start(self, count: int) -> None:
        for fake in self.fakes[:count]:
            self.workers.append(await self.gateway.add_worker(Role.ATTN, fake))

    async def add_second(self) -> None:
        self.workers.append(await self.gateway.add_worker(Role.ATTN, self.second))

    def ask(self, **sampling: object) -> "asyncio.Task[list[Any]]":
        sampling.setdefault("max_tokens", 5)
        return asyncio.create_task(self._collect(pb.SamplingParams(**sampling)))

    async def _collect(self, sampling: pb.SamplingParams) -> list[Any]:
        ids = pb.TokenIds(ids=[5, 6])
        message = pb.GenerateRequest(request_id="r1", token_ids=ids, sampling=sampling)
        call = self.gateway.stub.Generate(message, timeout=DEADLINE_S)
        return [answer async for answer in call]

    async def lose_first(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.first.paused.wait()
        await asyncio.sleep(0.02)  # what was put out before arrives
        await self.workers[0].stop()


@asynccontextmanager
async def tier(
    parallel: ParallelConfig = TWO_GROUPS,
    *,
    groups: int = 2,
    attn_wait_s: float = 5.0,
    hands_over: bool = False,
) -> AsyncIterator[Tier]:
    metrics = RequestMetrics("small", 64)
    async with SmallGateway(
        parallel, word_tokenizer(), observer=metrics, attn_wait_s=attn_wait_s
    ) as gateway:
        started = Tier(gateway, metrics)
        for fake in started.fakes:
            fake.hands_over = hands_over
        await started.start(groups)
        yield started


def tokens_of(answers: Sequence[Any], index: int = 0) -> list[int]:
    return [token for each in answers if each.index == index for token in each.token_ids]


def text_of(answers: Sequence[Any], index: int = 0) -> str:
    return "".join(each.text for each in answers if each.index == index)


async def refusal(call: "asyncio.Task[list[Any]]") -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("received", [0, 1, 4])
async def test_a_stream_goes_on_where_its_group_was_lost(received: int) -> None:
    async with tier() as both:
        both.first.pause_at = received
        call = both.ask(temperature=1.0)
        await both.lose_first()
        answers = await call
        assert both.moves == 1
    assert tokens_of(answers) == TOKENS
    assert text_of(answers) == " ".join(WORDS[7:12])
    assert [answer.finish_reason for answer in answers if answer.finish_reason] == ["length"]
    usage = answers[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (2, 5)
    (first,), (second,) = both.first.added, both.second.added
    assert list(second.output_ids) == TOKENS[:received]
    first.ClearField("output_ids")
    second.ClearField("output_ids")
    second.take_over = False
    assert first == second  # the same seed and all other settings


async def test_a_choice_whose_last_token_came_without_its_end_is_ended_here() -> None:
    async with tier() as both:
        both.first.pause_at = 5
        call = both.ask()
        await both.lose_first()
        answers = await call
        assert both.moves == 0
    assert (tokens_of(answers), answers[-1].finish_reason) == (TOKENS, "length")
    assert both.second.added == []


async def test_every_choice_moves_with_its_own_tokens() -> None:
    async with tier() as both:
        for fake in both.fakes:
            fake.script_of_index = {1: [20, 21], 2: [30, 31, 32, 33]}
        both.first.pause_at = 1
        call = both.ask(n=3)
        await both.lose_first()
        answers = await call
    assert [tokens_of(answers, index) for index in range(3)] == [
        TOKENS, [20, 21], [30, 31, 32, 33],
    ]  # fmt: skip
    assert [list(add.output_ids) for add in both.second.added] == [[7], [20], [30]]
    assert [add.sampling.index for add in both.second.added] == [0, 1, 2]
    seeds = {add.sampling.seed for fake in both.fakes for add in fake.added}
    assert len(seeds) == 1


async def test_a_stop_string_is_found_across_the_move() -> None:
    async with tier() as both:
        both.first.pause_at = 2
        call = both.ask(stop=[f"{WORDS[8][-2:]} {WORDS[9][:2]}"])
        await both.lose_first()
        answers = await call
        await both.second.wait_for_abort()
    assert text_of(answers) == f"{WORDS[7]} {WORDS[8]}"[:-2]
    assert (tokens_of(answers), answers[-1].finish_reason) == ([7, 8, 9], "stop")


async def test_each_token_has_its_logprobs_once_and_the_first_groups_cached_tokens_count() -> None:
    async with tier() as both:
        for count, fake in enumerate(both.fakes, 1):
            fake.logprobs = logprobs_pb2.TokenLogprobs(token_id=7, logprob=-0.5, rank=1)
            fake.cached_tokens = count
        both.first.pause_at = 3
        call = both.ask(logprobs=0)
        await both.lose_first()
        answers = await call
    assert sum(len(answer.logprobs) for answer in answers) == 5
    assert answers[-1].usage.cached_tokens == 1


async def test_the_only_group_is_waited_for() -> None:
    async with tier(ParallelConfig(), groups=1) as alone:
        alone.first.pause_at = 2
        call = alone.ask()
        await alone.lose_first()
        await alone.add_second()
        answers = await call
    assert tokens_of(answers) == TOKENS
    assert [list(add.output_ids) for add in alone.second.added] == [[7, 8]]


async def test_without_another_group_the_wait_ends_with_an_error_that_names_them() -> None:
    async with tier(groups=1, attn_wait_s=0.1) as alone:
        alone.first.pause_at = 2
        call = alone.ask()
        await alone.lose_first()
        error = await refusal(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "attention group dp_rank=0 at 127.0.0.1:" in error.details()
    assert "within 0.1 s: attn 0: not joined; attn 1: not joined" in error.details()


@pytest.mark.parametrize(
    "error", [("INVALID_ARGUMENT", "seed: no"), ("UNAVAILABLE", "layer 3: expert 1 is gone")]
)
async def test_an_error_of_the_request_or_of_the_experts_is_not_tried_elsewhere(
    error: tuple[str, str],
) -> None:
    async with tier() as both:
        both.first.error = error
        refused = await refusal(both.ask())
    assert (refused.code().name, refused.details()) == error
    assert both.second.added == []


async def test_what_an_engine_cannot_go_on_with_goes_elsewhere() -> None:
    async with tier() as both:
        both.first.error, both.first.go_elsewhere = ("UNAVAILABLE", "it drains"), True
        both.first.failing_index = 1
        both.first.step_s = 0.01
        answers = await both.ask(n=2)
    assert [tokens_of(answers, index) for index in range(2)] == [TOKENS, TOKENS]
    assert {add.sampling.index for add in both.second.added} >= {1}


async def test_a_request_that_loses_every_group_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.group_choice.REST_S", 0.0)
    async with tier() as both:
        for fake in both.fakes:
            fake.error, fake.go_elsewhere = ("INTERNAL", "it broke"), True
        error = await refusal(both.ask())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "it broke; so were 5 groups before it: giving up" in error.details()
    assert sum(len(fake.added) for fake in both.fakes) == MAX_LOSSES + 1


async def test_a_group_that_drains_gives_its_streams_away_at_once() -> None:
    async with tier() as both:
        both.first.pause_at = 2
        call = both.ask()
        await both.first.paused.wait()
        await asyncio.sleep(0.02)
        both.workers[0].report(MemberState.DRAINING)
        answers = await call
        await both.first.wait_for_abort()
    assert tokens_of(answers) == TOKENS
    assert [list(add.output_ids) for add in both.second.added] == [[7, 8]]


async def test_a_group_that_hands_over_parks_all_choices_and_the_next_is_told_where() -> None:
    async with tier(hands_over=True) as both:
        both.first.pause_at = 2
        call = both.ask(n=2)
        await both.first.paused.wait()
        await asyncio.sleep(0.02)
        epoch = both.gateway.registry.state.tier(Role.ATTN)[0].instance_epoch
        both.workers[0].report(MemberState.DRAINING)
        answers = await call
        assert both.moves == 1
    assert [tokens_of(answers, index) for index in range(2)] == [TOKENS, TOKENS]
    assert both.first.aborted == []
    for add in both.second.added:
        source = add.kv_source
        assert list(add.output_ids) == [7, 8]
        assert (source.dp_rank, source.instance_epoch) == (0, epoch)
        assert (source.parked.num_tokens, list(source.parked.block_ids)) == (6, [4, 2])


async def test_what_a_lost_group_may_have_kept_is_not_asked_for() -> None:
    async with tier(hands_over=True) as both:
        both.first.pause_at = 2
        call = both.ask()
        await both.lose_first()
        assert tokens_of(await call) == TOKENS
    assert [add.HasField("kv_source") for add in both.second.added] == [False]


async def test_an_abort_ends_a_stream_that_is_about_to_leave() -> None:
    async with tier(hands_over=True) as both:
        both.first.pause_at = 2
        call = both.ask(n=2)
        await both.first.paused.wait()
        await asyncio.sleep(0.02)
        both.first.hears.clear()
        both.workers[0].report(MemberState.DRAINING)
        await asyncio.sleep(0.1)
        abort = pb.AbortRequest(request_id="r1")
        assert (await both.gateway.stub.Abort(abort, timeout=DEADLINE_S)).found
        both.first.hears.set()
        answers = await call
    assert [answer.finish_reason for answer in answers if answer.finish_reason] == ["abort"] * 2
    assert both.second.added == []


async def test_a_group_that_drains_alone_finishes_its_streams() -> None:
    async with tier(groups=1) as alone:
        alone.first.step_s = 0.05
        call = alone.ask()
        while not alone.first.added:
            await asyncio.sleep(0.01)
        alone.workers[0].report(MemberState.DRAINING)
        assert tokens_of(await call) == TOKENS
    assert alone.first.aborted == []


async def test_abort_ends_a_stream_that_waits_for_another_group() -> None:
    async with tier(groups=1) as alone:
        alone.first.pause_at = 2
        call = alone.ask(n=2)
        await alone.lose_first()
        await asyncio.sleep(0.05)
        abort = pb.AbortRequest(request_id="r1")
        assert (await alone.gateway.stub.Abort(abort, timeout=DEADLINE_S)).found
        answers = await call
    assert [answer.finish_reason for answer in answers if answer.finish_reason] == ["abort"] * 2
    assert not alone.gateway.generator.under_way


async def test_who_waits_in_line_waits_for_a_group_too() -> None:
    async with SmallGateway(attn_wait_s=5.0) as gateway:
        first, second = FakeAttention(count_up, step_s=60), FakeAttention(count_up)
        worker = await gateway.add_worker(Role.ATTN, first, max_num_seqs=1)
        message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]))
        calls = [gateway.stub.Generate(message, timeout=DEADLINE_S) for _ in range(4)]
        while gateway.registry.queued_requests < 2:
            await asyncio.sleep(0.01)
        await worker.stop()
        await gateway.add_worker(Role.ATTN, second)
        for call in calls:
            assert tokens_of([answer async for answer in call]) == TOKENS


@pytest.mark.parametrize("ends", [True, False])
async def test_an_id_may_be_used_again_while_its_predecessors_tokens_are_on_their_way(
    ends: bool,
) -> None:
    """The abort comes when the predecessor has ended, or before."""
    async with tier(ParallelConfig(), groups=1) as alone:
        alone.first.step_s = 0.02
        call = alone.ask()
        while not alone.first.added:
            await asyncio.sleep(0)
        alone.first.hears.clear()
        call.cancel()
        await asyncio.wait({call})
        while alone.gateway.generator.under_way:
            await asyncio.sleep(0)
        again = alone.ask()
        await asyncio.sleep(0.2 if ends else 0.03)
        alone.first.hears.set()
        assert tokens_of(await again) == TOKENS
    assert len(alone.first.added) == 2
