"""VllmEngine as smg calls it: every method, by the stubs that smg's own package brings."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from gateway.vllm_servicer import VllmServicer
from moe_core.cluster import MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.pb.epserve.v1 import logprobs_pb2
from moe_core.pb.smg import common_pb2 as our_common
from moe_core.pb.smg import vllm_engine_pb2 as ours
from support.fake_attention import FakeAttention
from support.small_gateway import MODEL_DIRECTORY, SmallGateway
from support.words import WORDS, word_tokenizer

Stub: TypeAlias = Any  # generated stubs have no types

DEADLINE_S = 10
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
async def gateway() -> AsyncIterator[SmallGateway]:
    async with SmallGateway(tokenizer=word_tokenizer()) as gateway:
        yield gateway


@pytest.fixture
def stub(gateway: SmallGateway) -> Stub:
    return vllm_engine_pb2_grpc.VllmEngineStub(gateway.channel)


def count_up(prompt: Sequence[int]) -> list[int]:
    return [prompt[-1] + step for step in range(1, 4)]


def request(stream: bool = False, **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id="r1",
        tokenized=pb.TokenizedInput(original_text="is not read", input_ids=[5, 6]),
        sampling_params=pb.SamplingParams(**sampling),
        stream=stream,
    )


async def collect(stub: Stub, message: pb.GenerateRequest) -> list[Any]:
    return [answer async for answer in stub.Generate(message, timeout=DEADLINE_S)]


async def refused(stub: Stub, message: pb.GenerateRequest) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub, message)
    assert caught.value.code() is INVALID
    return caught.value.details()


def chunk(token_id: int, index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        chunk=pb.GenerateStreamChunk(
            token_ids=[token_id], prompt_tokens=2, completion_tokens=1, index=index
        )
    )


def complete(*token_ids: int, index: int = 0, **more: object) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        complete=pb.GenerateComplete(
            output_ids=token_ids,
            prompt_tokens=2,
            completion_tokens=len(token_ids),
            index=index,
            **{"finish_reason": "length", **more},
        )
    )


def test_the_protocol_is_the_one_that_smg_brings() -> None:
    assert ours.DESCRIPTOR.serialized_pb == pb.DESCRIPTOR.serialized_pb
    assert our_common.DESCRIPTOR.serialized_pb == common_pb2.DESCRIPTOR.serialized_pb


async def test_a_stream_is_new_tokens_and_then_all_of_them(
    gateway: SmallGateway, stub: Stub
) -> None:
    fake = FakeAttention(count_up)
    fake.cached_tokens = 1
    await gateway.add_worker(Role.ATTN, fake)
    answers = await collect(stub, request(stream=True))
    assert answers == [chunk(7), chunk(8), chunk(9), complete(7, 8, 9, cached_tokens=1)]


async def test_without_stream_there_is_one_answer(gateway: SmallGateway, stub: Stub) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    assert await collect(stub, request()) == [complete(7, 8, 9)]


async def test_every_choice_is_answered_under_its_index(gateway: SmallGateway, stub: Stub) -> None:
    fake = FakeAttention(count_up)
    fake.script_of_index = {1: [20, 21]}
    await gateway.add_worker(Role.ATTN, fake)
    answers = await collect(stub, request(n=2))
    assert sorted(answers, key=lambda answer: answer.complete.index) == [
        complete(7, 8, 9),
        complete(20, 21, index=1),
    ]


async def test_text_is_cut_into_tokens_too(gateway: SmallGateway, stub: Stub) -> None:
    fake = FakeAttention(count_up)
    await gateway.add_worker(Role.ATTN, fake)
    message = pb.GenerateRequest(text=f"{WORDS[5]} {WORDS[6]}")
    assert await collect(stub, message) == [complete(7, 8, 9)]
    assert list(fake.added[0].prompt_ids) == [5, 6]


async def test_every_sampling_field_reaches_the_engine(gateway: SmallGateway, stub: Stub) -> None:
    fake = FakeAttention(count_up)
    await gateway.add_worker(Role.ATTN, fake)
    await collect(
        stub,
        request(
            temperature=0.5,
            top_p=0.75,
            top_k=7,
            min_p=0.25,
            frequency_penalty=0.5,
            presence_penalty=-1.5,
            repetition_penalty=1.25,
            max_tokens=3,
            min_tokens=2,
            stop_token_ids=[40],
            logprobs=4,
            seed=11,
            logit_bias={3: -2.0},
            skip_special_tokens=True,
            spaces_between_special_tokens=True,
            include_stop_str_in_output=True,
        ),
    )
    sent = fake.added[0].sampling
    assert (sent.temperature, sent.top_p, sent.top_k, sent.min_p) == (0.5, 0.75, 7, 0.25)
    assert (sent.frequency_penalty, sent.presence_penalty) == (0.5, -1.5)
    assert (sent.repetition_penalty, sent.max_tokens, sent.min_tokens) == (1.25, 3, 2)
    assert (list(sent.stop_token_ids), sent.logprobs, sent.seed) == ([1, 40], 4, 11)
    assert dict(sent.logit_bias) == {3: -2.0}


async def test_what_is_left_out_takes_the_default(gateway: SmallGateway, stub: Stub) -> None:
    fake = FakeAttention(count_up)
    await gateway.add_worker(Role.ATTN, fake, total_kv_blocks=8)
    await collect(stub, request(ignore_eos=True))
    sent = fake.added[0].sampling
    assert (sent.temperature, sent.top_p, sent.top_k, sent.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sent.repetition_penalty, sent.max_tokens) == (1.0, 8 * 4 + 1 - 2)
    assert list(sent.stop_token_ids) == []
    assert not sent.HasField("logprobs")


async def test_a_stop_string_ends_the_output(gateway: SmallGateway, stub: Stub) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    answers = await collect(stub, request(stop=[WORDS[8]]))
    assert answers == [complete(7, 8, finish_reason="stop")]


async def test_logprobs_come_with_the_tokens(gateway: SmallGateway, stub: Stub) -> None:
    fake = FakeAttention(lambda prompt: [7])
    fake.logprobs = logprobs_pb2.TokenLogprobs(
        token_id=7, logprob=-1.5, rank=2, top_token_ids=[8, 7], top_logprobs=[-0.5, -1.5]
    )
    await gateway.add_worker(Role.ATTN, fake)
    expected = pb.OutputLogProbs(
        token_logprobs=[-1.5],
        token_ids=[7],
        top_logprobs=[pb.TopLogProbs(values=[-0.5, -1.5], token_ids=[8, 7])],
    )
    answers = await collect(stub, request(stream=True, logprobs=2))
    assert answers[0].chunk.output_logprobs == expected
    assert answers[1].complete.output_logprobs == expected


def of_prompt(*top: pb.TopLogProbs) -> pb.InputLogProbs:
    """What is told of the prompt (5, 6)."""
    values = [pb.InputTokenLogProb(), pb.InputTokenLogProb(value=-1.5)]
    return pb.InputLogProbs(token_logprobs=values, token_ids=[5, 6], top_logprobs=top)


@pytest.mark.parametrize("count", [0, 2])
async def test_logprobs_of_the_prompt_come_first_and_at_the_end(
    gateway: SmallGateway, stub: Stub, count: int
) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    likeliest = pb.TopLogProbs(values=[-0.25, -0.5], token_ids=[1, 2])
    told = of_prompt(*(() if count == 0 else (pb.TopLogProbs(), likeliest)))
    first, *others, last = await collect(stub, request(stream=True, prompt_logprobs=count))
    assert first.chunk.input_logprobs == told
    assert not any(each.chunk.HasField("input_logprobs") for each in others)
    assert last == complete(7, 8, 9, input_logprobs=told)


async def test_logprobs_of_the_prompt_alone_need_no_token(
    gateway: SmallGateway, stub: Stub
) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    asked = request(stream=True, prompt_logprobs=0, max_tokens=0, n=2)
    answers = await collect(stub, asked)
    assert sorted(answers, key=lambda answer: answer.complete.index) == [
        complete(index=index, input_logprobs=of_prompt()) for index in range(2)
    ]


async def test_of_a_prompt_of_one_token_there_is_nothing_to_tell_but_that_it_is_there(
    gateway: SmallGateway, stub: Stub
) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    message = request(prompt_logprobs=1)
    message.tokenized.input_ids[:] = [6]
    (answer,) = await collect(stub, message)
    assert answer.complete.input_logprobs == pb.InputLogProbs(
        token_logprobs=[pb.InputTokenLogProb()], token_ids=[6], top_logprobs=[pb.TopLogProbs()]
    )


async def test_logprobs_of_text_are_refused_by_name(gateway: SmallGateway, stub: Stub) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    sampling = pb.SamplingParams(prompt_logprobs=0)
    message = pb.GenerateRequest(text=WORDS[5], sampling_params=sampling)
    assert (await refused(stub, message)).startswith("sampling_params.prompt_logprobs: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("json_schema", "{}"),
        ("regex", "a"),
        ("grammar", "root"),
        ("structural_tag", "{}"),
        ("json_object", True),
        ("choice", pb.ChoiceConstraint(choices=["a"])),
        ("truncate_prompt_tokens", 4),
    ],
)
async def test_sampling_that_is_not_supported_is_refused_by_name(
    stub: Stub, gateway: SmallGateway, field: str, value: object
) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    assert f"sampling_params.{field}: " in await refused(stub, request(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_transfer_params", pb.KvTransferParams(remote_host="other")),
        ("kv_transfer_params_json", "{}"),
        ("mm_inputs", pb.MultimodalInputs()),
        ("extra_mm_inputs", [pb.MultimodalInputs()]),
        ("media_refs", pb.MediaRefs()),
        ("data_parallel_rank", 0),
    ],
)
async def test_what_else_is_not_supported_is_refused_by_name(
    stub: Stub, gateway: SmallGateway, field: str, value: object
) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    message = pb.GenerateRequest(**{"tokenized": pb.TokenizedInput(input_ids=[5]), field: value})
    assert (await refused(stub, message)).startswith(f"{field}: ")


async def test_admission_rules_hold_here_too(gateway: SmallGateway, stub: Stub) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    assert "logprobs=-1" in await refused(stub, request(logprobs=-1))
    assert "prompt_logprobs=-1" in await refused(stub, request(prompt_logprobs=-1))
    assert "seed=-1" in await refused(stub, request(seed=-1))
    assert "prompt: must have" in await refused(stub, pb.GenerateRequest())


async def test_bytes_that_are_no_message_are_an_invalid_argument(gateway: SmallGateway) -> None:
    call = gateway.channel.unary_stream("/vllm.grpc.engine.VllmEngine/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [answer async for answer in call(b"\xff\xff\xff", timeout=DEADLINE_S)]
    assert caught.value.code() is INVALID
    assert "vllm.grpc.engine.GenerateRequest" in caught.value.details()


async def test_abort_ends_all_named_requests_and_ignores_others(
    gateway: SmallGateway, stub: Stub
) -> None:
    fake = FakeAttention(count_up, step_s=0.1)
    await gateway.add_worker(Role.ATTN, fake)
    answers = aiter(stub.Generate(request(stream=True), timeout=DEADLINE_S))
    assert await anext(answers) == chunk(7)
    abort = pb.AbortRequest(request_ids=["unknown", "r1"])
    assert await stub.Abort(abort, timeout=DEADLINE_S) == pb.AbortResponse()
    last = [answer async for answer in answers][-1]
    assert last.complete.finish_reason == "abort"
    await fake.wait_for_abort()


async def test_health_is_the_gateways_own(gateway: SmallGateway, stub: Stub) -> None:
    answer = await stub.HealthCheck(pb.HealthCheckRequest(), timeout=DEADLINE_S)
    assert not answer.healthy
    assert "attn 0: not joined" in answer.message
    gateway.registry.set_gateway(MemberState.READY)
    answer = await stub.HealthCheck(pb.HealthCheckRequest(), timeout=DEADLINE_S)
    assert answer == pb.HealthCheckResponse(healthy=True, message="ready")


async def test_model_info(stub: Stub) -> None:
    path = str(MODEL_DIRECTORY)
    assert await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=DEADLINE_S) == (
        pb.GetModelInfoResponse(
            model_path=path,
            is_generation=True,
            max_context_length=128,
            vocab_size=64,
            served_model_name="small",
            tokenizer_path=path,
            model_type="deepseek_v3",
            eos_token_ids=[1],
            max_req_input_len=127,
        )
    )


async def test_server_info_counts_what_is_under_way(gateway: SmallGateway, stub: Stub) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up, step_s=0.1))
    ask = pb.GetServerInfoRequest()
    before = await stub.GetServerInfo(ask, timeout=DEADLINE_S)
    assert (before.active_requests, before.last_receive_timestamp) == (0, 0.0)
    assert (before.server_type, before.data_parallel_size) == ("vllm-grpc", 1)
    answers = aiter(stub.Generate(request(stream=True), timeout=DEADLINE_S))
    await anext(answers)
    after = await stub.GetServerInfo(ask, timeout=DEADLINE_S)
    assert after.active_requests == 1
    assert after.last_receive_timestamp > 0
    assert after.uptime_seconds > before.uptime_seconds


async def test_loads_are_those_of_the_groups() -> None:
    async with SmallGateway(ParallelConfig(attn_devices=2, dp_size=2)) as gateway:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(gateway.channel)
        for _ in range(2):
            await gateway.add_worker(Role.ATTN, FakeAttention(count_up), total_kv_blocks=8)
        answer = await stub.GetLoads(pb.GetLoadsRequest(), timeout=DEADLINE_S)
        loads = [pb.SchedulerLoad(dp_rank=rank, max_total_num_tokens=32) for rank in range(2)]
        assert (list(answer.loads), answer.dp_rank_count) == (loads, 2)
        one = await stub.GetLoads(pb.GetLoadsRequest(dp_rank=1), timeout=DEADLINE_S)
        assert list(one.loads) == loads[1:]
        with pytest.raises(grpc.aio.AioRpcError, match="dp_rank=2: groups that report: 0, 1"):
            await stub.GetLoads(pb.GetLoadsRequest(dp_rank=2), timeout=DEADLINE_S)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Embed", pb.EmbedRequest()),
        ("FlushCache", common_pb2.FlushCacheRequest()),
        ("StartProfile", common_pb2.StartProfileRequest()),
        ("StopProfile", common_pb2.StopProfileRequest()),
        ("GetTokenizer", common_pb2.GetTokenizerRequest()),
        ("SubscribeKvEvents", common_pb2.SubscribeKvEventsRequest()),
    ],
)
async def test_what_is_not_served_says_why(stub: Stub, method: str, message: Message) -> None:
    call = getattr(stub, method)(message, timeout=DEADLINE_S)
    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
    assert f"VllmEngine/{method} is not served here: " in await call.details()


def test_every_method_of_the_protocol_is_answered_by_us() -> None:
    methods = pb.DESCRIPTOR.services_by_name["VllmEngine"].methods
    assert [method.name for method in methods if method.name not in vars(VllmServicer)] == []
