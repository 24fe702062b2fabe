"""EpserveClient against a gateway's own servicer, with scripted attention workers."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from starlette.applications import Starlette

from epserve.client import EpserveClient
from epserve.generate_messages import Output, Sampling, TokenLogprobs, Usage
from gateway.http.host import HttpHost
from moe_core.cluster import ExpertLoad, MemberState, Role
from moe_core.errors import PeerTimeoutError, RequestError, UnavailableError
from moe_core.service.certificates import Certificates
from moe_core.service.peer_roles import PeerRole
from support.certificates import CertificateAuthority
from support.fake_attention import FakeAttention
from support.full_sampling import FULL_SAMPLING
from support.small_gateway import MODEL, SmallGateway
from support.words import word_tokenizer


@pytest.fixture
async def gateway() -> AsyncIterator[SmallGateway]:
    async with SmallGateway(tokenizer=word_tokenizer()) as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: SmallGateway) -> AsyncIterator[EpserveClient]:
    async with EpserveClient(gateway.address) as client:
        yield client


def count_up(prompt: Sequence[int]) -> list[int]:
    return [prompt[-1] + step for step in range(1, 6)]


async def collect(client: EpserveClient, ids: Sequence[int] = (5, 6)) -> list[Output]:
    return [output async for output in client.generate(ids, Sampling(max_tokens=5))]


async def test_outputs_come_as_plain_values_with_usage_on_the_last(
    gateway: SmallGateway, client: EpserveClient
):
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    outputs = await collect(client)
    assert [token for output in outputs for token in output.token_ids] == [7, 8, 9, 10, 11]
    assert [output.finish_reason for output in outputs][-1] == "length"
    assert [output.usage for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].usage == Usage(prompt_tokens=2, completion_tokens=5)


async def test_closing_the_iterator_cancels_the_request(
    gateway: SmallGateway, client: EpserveClient
):
    fake = FakeAttention(count_up, step_s=0.1)
    await gateway.add_worker(Role.ATTN, fake)
    outputs = client.generate((5, 6))
    await anext(outputs)
    await outputs.aclose()
    await fake.wait_for_abort()


async def test_silence_is_a_timeout_that_names_the_gateway(
    gateway: SmallGateway, client: EpserveClient
):
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up, step_s=5.0))
    with pytest.raises(PeerTimeoutError, match=gateway.address):
        await anext(client.generate((5, 6), idle_timeout_s=0.1))


async def test_a_refused_request_is_a_request_error(gateway: SmallGateway, client: EpserveClient):
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    with pytest.raises(RequestError, match="max_tokens"):
        await anext(client.generate((5, 6), Sampling(max_tokens=0)))


async def test_every_sampling_field_arrives(gateway: SmallGateway, client: EpserveClient):
    fake = FakeAttention(count_up)
    await gateway.add_worker(Role.ATTN, fake)
    outputs = [output async for output in client.generate((5, 6), FULL_SAMPLING)]
    assert {output.index for output in outputs} == {0, 1}
    told = fake.added[1].sampling
    assert (told.max_tokens, told.min_tokens, told.logprobs, told.seed) == (9, 2, 20, 7)
    assert told.prompt_logprobs == 3
    assert (told.temperature, told.top_p, told.top_k, told.min_p) == (0.5, 0.25, 3, 0.125)
    assert (told.repetition_penalty, told.presence_penalty) == (1.5, -2.0)
    assert (told.frequency_penalty, dict(told.logit_bias)) == (2.0, {3: 1.0, 15: -2.5})
    assert list(told.stop_token_ids) == [4, 5]


async def test_logprobs_of_the_prompt_come_once_for_each_choice(
    gateway: SmallGateway, client: EpserveClient
):
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    told = (TokenLogprobs(6, -1.5, 6, ((1, -0.25),)), TokenLogprobs(7, -1.75, 7, ((1, -0.25),)))
    sampling = Sampling(max_tokens=5, prompt_logprobs=1, n=2)
    outputs = [output async for output in client.generate((5, 6, 7), sampling)]
    for index in range(2):
        first, *rest = [output for output in outputs if output.index == index]
        assert first.prompt_logprobs == told
        assert not any(output.prompt_logprobs for output in rest)
    alone = Sampling(max_tokens=0, prompt_logprobs=1)
    (only,) = [output async for output in client.generate((5, 6, 7), alone)]
    assert (only.prompt_logprobs, only.token_ids, only.finish_reason) == (told, (), "length")
    assert only.usage == Usage(prompt_tokens=3, completion_tokens=0)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(n=-1), "n=-1: must be from 0 to 4294967295$"),
        (Sampling(logit_bias={-3: 1.0}), "logit_bias=.*: must be from 0 to 4294967295$"),
        (Sampling(top_k=2**31), "top_k=2147483648: must be from -2147483648 to 2147483647$"),
        (Sampling(seed=-1), "seed=-1: must be from 0 to 18446744073709551615$"),
        (Sampling(stop=("\ud800",)), "stop: is not valid Unicode"),
    ],
)
async def test_a_number_that_the_wire_can_not_carry_is_a_request_error(
    client: EpserveClient, sampling: Sampling, message: str
):
    with pytest.raises(RequestError, match=message):
        await anext(client.generate((5, 6), sampling))
    with pytest.raises(RequestError, match="token_ids: must be from 0 to 4294967295"):
        await anext(client.generate((5, 2**32)))


async def test_a_gateway_that_is_not_there_is_unavailable_and_named():
    async with EpserveClient("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
            await client.cluster()
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
            await client.list_models()


async def test_models_and_cluster_come_as_plain_values(
    gateway: SmallGateway, client: EpserveClient
):
    await gateway.add_worker(Role.ATTN, FakeAttention(count_up))
    (model,) = await client.list_models()
    assert (model.id, model.has_tokenizer) == ("small", True)
    state = await client.cluster()
    assert [member.state for member in state.tier(Role.ATTN)] == [MemberState.READY]


async def test_the_expert_load_is_told_to_who_asks_for_it(
    gateway: SmallGateway, client: EpserveClient
):
    worker = await gateway.add_worker(Role.ATTN)
    load = ExpertLoad(MODEL.moe_layer_ids, ((1, 2, 3, 4, 5, 6, 7, 8), (9,) * 8))
    worker.membership.report_expert_load(load)
    async with asyncio.timeout(5):
        while (state := await client.cluster(expert_load=True)).expert_load is None:
            await asyncio.sleep(0.01)
    assert state.expert_load == load
    assert (await client.cluster()).expert_load is None


async def test_an_http_port_is_named_as_one() -> None:
    host = HttpHost()
    port = await host.start(Starlette(), "127.0.0.1", 0)
    try:
        async with EpserveClient(f"127.0.0.1:{port}") as client:
            with pytest.raises(UnavailableError, match=r"is an HTTP server, and not gRPC"):
                await client.cluster()
    finally:
        await host.stop(1.0)


async def test_a_gateway_that_closes_what_comes_in_the_clear_may_speak_tls(tmp_path: Path) -> None:
    role = PeerRole.GATEWAY
    tls = Certificates(CertificateAuthority().files(tmp_path, role), role)
    async with SmallGateway(tls=tls) as gateway, EpserveClient(gateway.address) as client:
        with pytest.raises(UnavailableError, match=r"list models at .*give --tls-ca$"):
            await client.list_models()
