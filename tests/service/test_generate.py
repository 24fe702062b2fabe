"""Generate, Abort and what happens when either side goes away, over real gRPC."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
import pytest

from gateway.tokenizer import TextTokenizer
from moe_core.cluster import Role
from moe_core.config.parallel import ParallelConfig
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from support.fake_attention import FakeAttention
from support.small_gateway import SmallGateway
from support.words import WORDS, word_tokenizer

DEADLINE_S = 10


@pytest.fixture
async def gateway() -> AsyncIterator[SmallGateway]:
    async with SmallGateway(tokenizer=word_tokenizer()) as gateway:
        yield gateway


def count_up(prompt: Sequence[int]) -> list[int]:
    return [prompt[-1] + step for step in range(1, 6)]


def request(ids: Sequence[int] = (5, 6), **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id="r1",
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingParams(**sampling),
    )


async def collect(gateway: SmallGateway, message: pb.GenerateRequest) -> list[Any]:
    return [answer async for answer in gateway.stub.Generate(message, timeout=DEADLINE_S)]


async def started(gateway: SmallGateway) -> tuple[Any, AsyncIterator[Any]]:
    """A call whose first answer has come, and the answers after it."""
    call = gateway.stub.Generate(request(), timeout=DEADLINE_S)
    answers = aiter(call)
    await anext(answers)
    return call, answers


async def refused(gateway: SmallGateway, message: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(gateway, message)
    return caught.value


async def test_tokens_text_and_usage_arrive_in_order(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up)
    await gateway.add_worker(Role.ATTN, fake)
    answers = await collect(gateway, request(max_tokens=5))
    assert [token for answer in answers for token in answer.token_ids] == [7, 8, 9, 10, 11]
    assert "".join(answer.text for answer in answers) == " ".join(WORDS[7:12])
    assert [answer.finish_reason for answer in answers] == ["", "", "", "", "length"]
    assert (answers[-1].usage.prompt_tokens, answers[-1].usage.completion_tokens) == (2, 5)
    assert fake.aborted == []


async def test_engine_is_told_every_default(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up)
    await gateway.add_worker(Role.ATTN, fake, total_kv_blocks=8)
    await collect(gateway, request())
    sampling = fake.added[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert sampling.max_tokens == 8 * 4 + 1 - 2
    assert list(sampling.stop_token_ids) == [1]
    assert sampling.seed != 0


async def test_text_prompt_is_tokenised(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up)
    await gateway.add_worker(Role.ATTN, fake)
    await collect(gateway, pb.GenerateRequest(text=f"{WORDS[3]} {WORDS[4]}"))
    assert list(fake.added[0].prompt_ids) == [3, 4]


async def test_a_text_that_takes_long_to_cut_into_tokens_holds_up_nobody(
    gateway: SmallGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    encode = TextTokenizer.encode

    def slow_encode(tokenizer: TextTokenizer, text: str) -> tuple[int, ...]:
        assert may_go_on.wait(DEADLINE_S)
        return encode(tokenizer, text)

    monkeypatch.setattr(TextTokenizer, "encode", slow_encode)
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    slow = asyncio.create_task(collect(gateway, pb.GenerateRequest(text=WORDS[6])))
    assert len(await collect(gateway, request(max_tokens=5))) == 5
    assert not slow.done()
    may_go_on.set()
    assert len(await slow) == 5


async def test_stop_string_across_tokens_ends_the_output_and_aborts(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up, step_s=0.02)
    await gateway.add_worker(Role.ATTN, fake)
    stop = f"{WORDS[8][-2:]} {WORDS[9][:2]}"
    answers = await collect(gateway, request(stop=[stop]))
    text = "".join(answer.text for answer in answers)
    assert text == f"{WORDS[7]} {WORDS[8]}"[:-2]
    assert answers[-1].finish_reason == "stop"
    assert [token for answer in answers for token in answer.token_ids] == [7, 8, 9]
    await fake.wait_for_abort()
    assert fake.aborted == [fake.added[0].sequence_id]


async def test_cancelled_client_aborts_the_sequence(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up, step_s=0.2)
    await gateway.add_worker(Role.ATTN, fake)
    call, _ = await started(gateway)
    call.cancel()
    await fake.wait_for_abort()
    assert fake.aborted == [fake.added[0].sequence_id]


async def test_deadline_aborts_the_sequence(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up, step_s=5)
    await gateway.add_worker(Role.ATTN, fake)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in gateway.stub.Generate(request(), timeout=0.3):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await fake.wait_for_abort()


async def test_abort_ends_the_stream_of_the_request(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up, step_s=0.1)
    await gateway.add_worker(Role.ATTN, fake)
    _, answers = await started(gateway)
    assert (await gateway.stub.Abort(pb.AbortRequest(request_id="r1"), timeout=5)).found
    last = [answer async for answer in answers][-1]
    assert last.finish_reason == "abort"
    assert last.usage.completion_tokens >= 1
    await fake.wait_for_abort()
    assert not (await gateway.stub.Abort(pb.AbortRequest(request_id="r1"), timeout=5)).found


def of_choice(answers: Sequence[Any], index: int) -> list[Any]:
    return [answer for answer in answers if answer.index == index]


async def test_choices_share_a_group_a_prompt_and_a_seed_and_come_interleaved() -> None:
    fakes = [FakeAttention(count_up, step_s=0.01) for _ in range(2)]
    async with SmallGateway(ParallelConfig(attn_devices=2, dp_size=2)) as gateway:
        for fake in fakes:
            await gateway.add_worker(Role.ATTN, fake)
        answers = await collect(gateway, request(n=3))
    (fake,) = [fake for fake in fakes if fake.added]
    assert [add.sampling.index for add in fake.added] == [0, 1, 2]
    assert len({add.sampling.seed for add in fake.added}) == 1
    assert {tuple(add.prompt_ids) for add in fake.added} == {(5, 6)}
    assert len({add.sequence_id for add in fake.added}) == 3
    for index in range(3):
        mine = of_choice(answers, index)
        assert [token for answer in mine for token in answer.token_ids] == [7, 8, 9, 10, 11]
        assert [answer.finish_reason for answer in mine] == ["", "", "", "", "length"]
        usage = mine[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (2, 5)
    assert [answer.index for answer in answers] != sorted(answer.index for answer in answers)
    assert {answer.request_id for answer in answers} == {"r1"}


async def test_request_without_an_id_is_given_one_of_its_own(gateway: SmallGateway) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    nameless = request()
    nameless.ClearField("request_id")
    given = [{each.request_id for each in await collect(gateway, nameless)} for _ in range(2)]
    assert [len(ids) for ids in given] == [1, 1]
    assert "" not in given[0] | given[1]
    assert given[0] != given[1]


async def test_abort_ends_every_choice(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up, step_s=0.1)
    await gateway.add_worker(Role.ATTN, fake)
    answers = aiter(gateway.stub.Generate(request(n=3), timeout=DEADLINE_S))
    await anext(answers)
    assert (await gateway.stub.Abort(pb.AbortRequest(request_id="r1"), timeout=5)).found
    rest = [answer async for answer in answers]
    assert [of_choice(rest, index)[-1].finish_reason for index in range(3)] == ["abort"] * 3
    await fake.wait_for_abort(3)


async def test_cancelled_client_aborts_every_choice(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up, step_s=0.2)
    await gateway.add_worker(Role.ATTN, fake)
    call = gateway.stub.Generate(request(n=3), timeout=DEADLINE_S)
    await anext(aiter(call))
    call.cancel()
    await fake.wait_for_abort(3)


async def test_a_choice_that_fails_ends_the_request_and_the_other_choices(
    gateway: SmallGateway,
) -> None:
    fake = FakeAttention(count_up, step_s=0.1)
    fake.error, fake.failing_index = ("UNAVAILABLE", "layer 3: expert process 1 is gone"), 1
    await gateway.add_worker(Role.ATTN, fake)
    error = await refused(gateway, request(n=3))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "layer 3" in error.details()
    await fake.wait_for_abort(2)
    assert sorted(fake.aborted) == sorted(
        add.sequence_id for add in fake.added if add.sampling.index != 1
    )


async def test_a_stop_string_ends_its_choice_and_no_other(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up, step_s=0.02)
    fake.script_of_index = {1: [20, 21, 22, 23]}
    await gateway.add_worker(Role.ATTN, fake)
    answers = await collect(gateway, request(n=2, stop=[WORDS[8]]))
    first, second = of_choice(answers, 0), of_choice(answers, 1)
    assert (first[-1].finish_reason, second[-1].finish_reason) == ("stop", "length")
    assert [token for answer in first for token in answer.token_ids] == [7, 8]
    assert [token for answer in second for token in answer.token_ids] == [20, 21, 22, 23]
    await fake.wait_for_abort()
    assert fake.aborted == [fake.added[0].sequence_id]


async def test_cached_tokens_come_with_the_usage(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up)
    fake.cached_tokens = 1
    await gateway.add_worker(Role.ATTN, fake)
    answers = await collect(gateway, request())
    assert answers[-1].usage.cached_tokens == 1


async def test_too_many_choices_are_refused_before_anything_is_sent(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up)
    await gateway.add_worker(Role.ATTN, fake)
    error = await refused(gateway, request(n=65))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "n=65" in error.details()
    assert fake.added == []


async def test_request_id_in_use_is_refused(gateway: SmallGateway) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up, step_s=0.2))
    call, _ = await started(gateway)
    error = await refused(gateway, request())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "request_id='r1'" in error.details()
    call.cancel()


async def test_lost_worker_fails_its_requests_with_its_name(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up, step_s=0.3)
    worker = await gateway.add_worker(Role.ATTN, fake)
    _, answers = await started(gateway)
    address = worker.membership.state.tier(Role.ATTN)[0].address
    await worker.stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in answers:
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert f"attention group dp_rank=0 at {address} was lost" in caught.value.details()


async def test_no_usable_group_names_what_is_missing() -> None:
    parallel = ParallelConfig(attn_devices=2, dp_size=1, expert_devices=2)
    async with SmallGateway(parallel) as gateway:
        await gateway.add_worker(Role.ATTN, rank=0)
        error = await refused(gateway, request())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    for phrase in ("attn 1: not joined", "expert 0: not joined", "expert 1: not joined"):
        assert phrase in error.details()


async def test_engine_error_keeps_its_status_and_message(gateway: SmallGateway) -> None:
    fake = FakeAttention(count_up)
    fake.error = ("UNAVAILABLE", "layer 3: expert process 1 is gone")
    await gateway.add_worker(Role.ATTN, fake)
    error = await refused(gateway, request())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "layer 3: expert process 1 is gone" in error.details()


async def test_burst_is_spread_over_the_groups() -> None:
    fakes = [FakeAttention(count_up, step_s=0.05) for _ in range(2)]
    async with SmallGateway(ParallelConfig(attn_devices=2, dp_size=2)) as gateway:
        for fake in fakes:
            await gateway.add_worker(Role.ATTN, fake)
        ids = [f"r{index}" for index in range(8)]
        messages = [request() for _ in ids]
        for message, request_id in zip(messages, ids, strict=True):
            message.request_id = request_id
        await asyncio.gather(*(collect(gateway, message) for message in messages))
    assert [len(fake.added) for fake in fakes] == [4, 4]


async def test_draining_gateway_ends_what_runs_and_refuses_the_rest(gateway: SmallGateway) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up, step_s=0.1))
    _, answers = await started(gateway)
    draining = asyncio.create_task(gateway.generator.drain())
    await asyncio.sleep(0)
    error = await refused(gateway, request())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert [answer async for answer in answers][-1].finish_reason == "length"
    async with asyncio.timeout(5):
        await draining


async def test_models_are_listed(gateway: SmallGateway) -> None:
    (card,) = (await gateway.stub.ListModels(pb.ListModelsRequest(), timeout=5)).models
    assert (card.id, card.vocab_size, card.has_tokenizer) == ("small", 64, True)
