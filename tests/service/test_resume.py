"""A gateway that is lost, and its clients' requests at another one, over a real engine."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from attn_service.servicer import AttentionServicer
from epserve.client import EpserveClient
from epserve.generate_messages import Sampling as ClientSampling
from epserve.resuming import ResumingClient, generate_resuming
from gateway.callers import Caller
from gateway.requests import GenerationRequest, Sampling
from moe_core.errors import NotFoundError, RequestError, UnavailableError
from moe_core.pb.epserve.v1 import attention_pb2
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from support.small_gateway import SmallGateway
from support.two_gateways import (
    DEADLINE_S,
    EXPECTED,
    PROMPT,
    Cluster,
    break_links,
    cluster,
    message,
    text_of,
    tokens_of,
    words_of,
)
from support.words import WORDS


async def resumed(gateway: SmallGateway, request: pb.GenerateRequest) -> list[Any]:
    return [answer async for answer in gateway.stub.Generate(request, timeout=DEADLINE_S)]


async def refusal(gateway: SmallGateway, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await resumed(gateway, request)
    return caught.value


@pytest.fixture
async def served() -> AsyncIterator[Cluster]:
    async with cluster() as started:
        yield started


@pytest.mark.parametrize("had", [0, 3, 6])
async def test_a_client_resumes_at_another_gateway_after_the_tokens_that_it_has(
    served: Cluster, had: int
) -> None:
    """The lost gateway had drawn the seed, and had more tokens than the client."""
    answers = await served.received_by_first(6)
    served.runner.let(100)
    rest = await resumed(served.second, message([had]))
    assert tokens_of(rest) == EXPECTED[had:]
    text_before = text_of(answers)[: len(words_of(EXPECTED[:had]))]
    assert text_before + text_of(rest) == words_of(EXPECTED)
    assert [answer.finish_reason for answer in rest if answer.finish_reason] == ["length"]
    assert rest[-1].usage.completion_tokens == 20
    assert served.engine.counters.output_tokens == 20


async def test_a_stop_string_that_began_before_the_loss_is_found_after_it(served: Cluster) -> None:
    stop = f"{WORDS[EXPECTED[2]][-2:]} {WORDS[EXPECTED[3]][:2]}"
    answers = await served.received_by_first(3, stop=[stop])
    served.runner.let(100)
    rest = await resumed(served.second, message([3], stop=[stop]))
    assert text_of(answers) + text_of(rest) == words_of(EXPECTED[:3])[:-2]
    assert (tokens_of(rest), rest[-1].finish_reason) == (EXPECTED[3:4], "stop")


async def test_logprobs_follow_the_tokens_that_are_sent(served: Cluster) -> None:
    await served.received_by_first(5, logprobs=1)
    served.runner.let(100)
    rest = await resumed(served.second, message([2], logprobs=1))
    assert [each.token_id for answer in rest for each in answer.logprobs] == EXPECTED[2:]


async def test_one_that_ended_while_its_client_had_no_gateway_is_told_to_its_end(
    served: Cluster,
) -> None:
    await served.received_by_first(4)
    served.runner.let(100)
    while served.engine.load.num_running:
        await asyncio.sleep(0.005)
    rest = await resumed(served.second, message([4]))
    assert tokens_of(rest) == EXPECTED[4:]
    again = await resumed(served.second, message([20]))
    assert (tokens_of(again), text_of(again)) == ([], "")
    assert again[-1].finish_reason == "length"


async def test_after_the_grace_a_drawn_seed_is_lost_and_the_client_is_told_what_would_do() -> None:
    async with cluster(orphan_grace_s=0.05) as served:
        await served.received_by_first(4)
        while any(stream.is_lost for stream in served.engine.sequences._streams):
            await asyncio.sleep(0.005)
        served.runner.let(1)
        async with asyncio.timeout(DEADLINE_S):
            while served.engine.load.free_kv_blocks < 64:
                await asyncio.sleep(0.005)
        error = await refusal(served.second, message([4]))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "with a seed or temperature=0" in error.details()
        assert not served.second.generator.under_way


@pytest.mark.parametrize("known", [{"seed": 7, "temperature": 1.0}, {"temperature": 0.0}])
async def test_after_the_grace_a_known_seed_gives_the_same_tokens_again(
    known: dict[str, object],
) -> None:
    async with cluster(orphan_grace_s=0.0) as served:
        answers = await served.received_by_first(4, **known)
        served.runner.let(100)
        rest = await resumed(served.second, message([4], **known))
        undisturbed = await resumed(served.second, message(**known))
    assert tokens_of(answers) + tokens_of(rest) == tokens_of(undisturbed)
    assert rest[-1].usage.completion_tokens == 20


async def test_a_seed_that_the_lost_gateway_drew_is_found_with_the_sequence(
    served: Cluster,
) -> None:
    """Choice 1 is not there any more, and follows from the seed of choice 0."""
    await served.received_by_first(2, n=2, temperature=1.0)
    (seed,) = {each.request.sampling.seed for each in served.engine.sequences._owner}
    stream = next(stream for stream in served.engine.sequences._streams if stream.is_lost)
    stream.abort(next(name for name in stream._sequences if name.endswith("/1")))
    served.runner.let(100)
    rest = await resumed(served.second, message([0, 0], n=2, temperature=1.0))
    undisturbed = await resumed(served.second, message(n=2, temperature=1.0, seed=seed))
    for index in range(2):
        assert tokens_of(rest, index) == tokens_of(undisturbed, index)


async def test_a_stream_that_broke_between_two_that_live_is_mended_and_nothing_computed_again(
    served: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.group_choice.REST_S", 0.02)
    served.runner.let(4)
    call = aiter(served.second.stub.Generate(message(logprobs=0), timeout=DEADLINE_S))
    answers = [await anext(call) for _ in range(4)]
    break_links(served.second)
    await served.until_orphaned()
    served.runner.let(100)
    answers += [answer async for answer in call]
    assert tokens_of(answers) == EXPECTED
    assert [each.token_id for answer in answers for each in answer.logprobs] == EXPECTED
    computed = (part for plan in served.runner.plans for part in plan.slices)
    assert sum(len(part.token_ids) for part in computed) == len(PROMPT) + 19


async def test_another_caller_finds_nothing(served: Cluster) -> None:
    await served.received_by_first(4)
    asked = GenerationRequest(
        "r1", "", PROMPT, Sampling(max_tokens=20), caller=Caller("b"), resume_from=(4,)
    )
    with pytest.raises(NotFoundError, match="request_id='r1'"):
        await anext(served.second.generator.generate(asked))
    served.runner.let(100)
    assert tokens_of(await resumed(served.second, message([4]))) == EXPECTED[4:]


async def test_another_prompt_is_refused_and_the_sequence_goes_on(served: Cluster) -> None:
    await served.received_by_first(4)
    other = message([4])
    other.token_ids.ids[:] = [9]
    error = await refusal(served.second, other)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt_ids: sequence_id=" in error.details()
    served.runner.let(100)
    assert tokens_of(await resumed(served.second, message([4]))) == EXPECTED[4:]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"request_id": ""}, "needs the request_id"),
        ({"resume_from": [1, 1]}, "2 counts for a request of 1 choices"),
        ({"resume_from": [21]}, "21 tokens of a choice of max_tokens=20"),
        ({"resume_from": [1] * 65}, "at most 64 counts"),
    ],
)
async def test_what_cannot_be_resumed_is_refused_by_name(
    served: Cluster, changed: dict[str, Any], words: str
) -> None:
    request = message([4])
    for name, value in changed.items():
        request.ClearField(name)
        request.MergeFrom(pb.GenerateRequest(**{name: value}))
    error = await refusal(served.second, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in error.details()


async def test_a_client_that_leaves_leaves_nothing_to_resume(served: Cluster) -> None:
    """Only a gateway's own end leaves sequences behind."""
    served.runner.let(2)
    call = served.first.stub.Generate(message(), timeout=DEADLINE_S)
    await anext(aiter(call))
    call.cancel()
    while served.first.generator.under_way:
        await asyncio.sleep(0.005)
    served.runner.let(1)
    async with asyncio.timeout(DEADLINE_S):
        while served.engine.load.free_kv_blocks < 64:
            await asyncio.sleep(0.005)
    error = await refusal(served.second, message([1]))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_gateway_that_ends_in_order_leaves_nothing_behind() -> None:
    async with cluster(orphan_grace_s=60.0) as served:
        served.runner.let(2)
        call = served.first.stub.Generate(message(), timeout=DEADLINE_S)
        await anext(aiter(call))
        await served.first.pool.close()
        served.runner.let(1)
        async with asyncio.timeout(DEADLINE_S):
            while served.engine.load.free_kv_blocks < 64:
                await asyncio.sleep(0.005)
        error = await refusal(served.second, message([1]))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_client_that_resumes_by_itself_sees_one_stream(served: Cluster) -> None:
    served.runner.let(4)
    sampling = ClientSampling(max_tokens=20, temperature=0.01, ignore_eos=True)
    async with (
        EpserveClient(served.first.address) as first,
        EpserveClient(served.second.address) as second,
    ):
        outputs = []
        async for output in generate_resuming([first, second], PROMPT, sampling):
            outputs.append(output)
            if len(outputs) == 4:
                served.lose_first()
                await served.until_orphaned()
                served.runner.let(100)
        assert tokens_of(outputs) == EXPECTED
        assert text_of(outputs) == words_of(EXPECTED)


async def test_a_client_that_had_no_token_yet_asks_the_next_address(served: Cluster) -> None:
    served.runner.let(100)
    sampling = ClientSampling(max_tokens=20, temperature=0.01, ignore_eos=True)
    async with EpserveClient("127.0.0.1:1") as nobody, EpserveClient(served.second.address) as one:
        client = ResumingClient([nobody, one], resume_s=5.0)
        outputs = [output async for output in client.generate(PROMPT, sampling, request_id="mine")]
    assert tokens_of(outputs) == EXPECTED
    assert {output.request_id for output in outputs} == {"mine"}


async def test_a_client_that_finds_no_gateway_gives_up_in_time() -> None:
    async with EpserveClient("127.0.0.1:1") as nobody:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
            await anext(generate_resuming([nobody], PROMPT, resume_s=0.2))


async def test_too_many_ids_are_not_looked_up(served: Cluster) -> None:
    servicer = AttentionServicer()
    servicer.lead(served.engine.sequences)
    request = attention_pb2.FindRequest(sequence_ids=["a"] * 65)
    with pytest.raises(RequestError, match="at most 64 ids, not 65"):
        await servicer.Find(request, None)
