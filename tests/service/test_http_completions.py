"""Completions and chat over real HTTP, from a worker without a model."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2
import pytest

from gateway.admission import ServedModel, admit
from gateway.http.chat_template import ChatTemplate
from gateway.requests import GenerationRequest
from gateway.requests import Sequence as Admitted
from moe_core.cluster import Role
from moe_core.pb.epserve.v1.logprobs_pb2 import TokenLogprobs
from support.fake_attention import FakeAttention
from support.http_gateway import TEMPLATE, http_side
from support.small_gateway import SmallGateway
from support.words import WORDS, word_tokenizer


def count_up(prompt: Sequence[int]) -> list[int]:
    return [prompt[-1] + step for step in range(1, 6)]


@pytest.fixture
async def gateway() -> AsyncIterator[SmallGateway]:
    async with SmallGateway(tokenizer=word_tokenizer()) as gateway:
        yield gateway


@pytest.fixture
async def fake(gateway: SmallGateway) -> FakeAttention:
    fake = FakeAttention(count_up)
    await gateway.add_worker(Role.ATTN, fake)
    return fake


@pytest.fixture
async def client(gateway: SmallGateway) -> AsyncIterator[httpx2.AsyncClient]:
    async with http_side(gateway, ChatTemplate(TEMPLATE, {}, "here")) as client:
        yield client


async def post(client: httpx2.AsyncClient, path: str, **body: object) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def events(client: httpx2.AsyncClient, path: str, **body: object) -> list[Any]:
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = (await response.aread()).decode()
    assert text.endswith("\n\n")
    found = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
    assert found[-1] == "[DONE]"
    return [json.loads(event) for event in found[:-1]]


def words(*tokens: int) -> str:
    return " ".join(WORDS[token] for token in tokens)


async def test_a_completion_of_each_prompt(client: httpx2.AsyncClient, fake: FakeAttention) -> None:
    answer = await post(client, "/v1/completions", prompt=[[5, 6], [20]], n=2, seed=1)
    assert answer["object"] == "text_completion"
    assert (answer["id"][:5], answer["model"]) == ("cmpl-", "small")
    expected = [words(*range(7, 12)), words(*range(21, 26))]
    assert [(each["index"], each["text"]) for each in answer["choices"]] == [
        (0, expected[0]),
        (1, expected[0]),
        (2, expected[1]),
        (3, expected[1]),
    ]
    assert {each["finish_reason"] for each in answer["choices"]} == {"length"}
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 20,
        "total_tokens": 23,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_the_engine_is_told_what_the_body_says(
    client: httpx2.AsyncClient, fake: FakeAttention
) -> None:
    fields = {"top_k": 3, "min_p": 0.5, "logit_bias": {"7": 1.5}, "stop_token_ids": [9]}
    more = {"ignore_eos": True, "min_tokens": 2, "repetition_penalty": 1.5, "priority": -4}
    await post(client, "/v1/completions", prompt=words(3, 4), **fields, **more)
    (added,) = fake.added
    sampling = added.sampling
    assert (list(added.prompt_ids), added.priority) == ([3, 4], -4)
    assert (sampling.top_k, sampling.min_p, dict(sampling.logit_bias)) == (3, 0.5, {7: 1.5})
    assert (list(sampling.stop_token_ids), sampling.min_tokens) == ([9], 2)
    assert (sampling.max_tokens, sampling.repetition_penalty) == (16, 1.5)


async def test_a_stream_has_the_same_text_and_tells_usage_last(
    client: httpx2.AsyncClient, fake: FakeAttention
) -> None:
    fake.cached_tokens = 1
    *parts, last = await events(
        client, "/v1/completions", prompt=[5, 6], stream_options={"include_usage": True}, echo=True
    )
    text = "".join(part["choices"][0]["text"] for part in parts)
    assert text == words(5, 6) + words(*range(7, 12))
    assert [part["usage"] for part in parts] == [None] * len(parts)
    reasons = [part["choices"][0]["finish_reason"] for part in parts]
    assert reasons == [None] * (len(parts) - 1) + ["length"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


async def test_usage_in_every_event(client: httpx2.AsyncClient, fake: FakeAttention) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = await events(client, "/v1/completions", prompt=[5], stream_options=options)
    counts = [each["usage"]["completion_tokens"] for each in found]
    assert counts == sorted(counts)
    assert counts[-1] == 5


async def test_token_ids_are_told_on_demand(
    client: httpx2.AsyncClient, fake: FakeAttention
) -> None:
    answer = await post(client, "/v1/completions", prompt=[5, 6], return_token_ids=True)
    (choice,) = answer["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5, 6], [7, 8, 9, 10, 11])
    found = await events(client, "/v1/completions", prompt=[5, 6], return_token_ids=True)
    choices = [each["choices"][0] for each in found]
    assert [token for each in choices for token in each["token_ids"]] == [7, 8, 9, 10, 11]
    assert [each["prompt_token_ids"] for each in choices] == [[5, 6]] + [None] * 4


@pytest.mark.parametrize("max_tokens", [0, 5])
async def test_echo_with_logprobs_tells_the_prompts_first(
    client: httpx2.AsyncClient, fake: FakeAttention, max_tokens: int
) -> None:
    if max_tokens:
        fake.logprobs = TokenLogprobs(token_id=9, logprob=-0.5, rank=1)
    body = {"prompt": [[5, 6, 7], [8]], "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    answer = await post(client, "/v1/completions", **body)
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens
    first, second = (choice["logprobs"] for choice in answer["choices"])
    outputs = [f" {WORDS[9]}"] * max_tokens
    assert first["tokens"] == [f" {WORDS[token]}" for token in (5, 6, 7)] + outputs
    assert first["token_logprobs"] == [None, -1.5, -1.75] + [-0.5] * max_tokens
    top = {f" {WORDS[6]}": -1.5, f" {WORDS[1]}": -0.25}
    assert first["top_logprobs"][:2] == [None, top]
    begun = [words(*[9] * index) for index in range(max_tokens)]
    assert first["text_offset"] == [
        *(len(words(*range(5, 5 + index))) for index in range(3)),
        *(len(words(5, 6, 7) + text) for text in begun),
    ]
    assert second["token_logprobs"] == [None] + [-0.5] * max_tokens
    texts = [words(5, 6, 7), words(8)]
    assert [
        choice["text"][: len(text)] for choice, text in zip(answer["choices"], texts, strict=True)
    ] == texts
    streamed = await events(client, "/v1/completions", **body)
    parts = [each["choices"][0] for each in streamed]
    parts = [part["logprobs"] for part in parts if part["index"] == 0]
    joined = {name: [value for part in parts for value in part[name]] for name in first}
    assert joined == first


async def test_a_chat_answers_by_the_models_template(
    client: httpx2.AsyncClient, fake: FakeAttention
) -> None:
    answer = await post(
        client,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": WORDS[4]}],
        chat_template_kwargs={"opening": WORDS[6]},
        max_completion_tokens=5,
    )
    assert list(fake.added[0].prompt_ids) == [4, 6]
    assert (answer["object"], answer["id"][:9]) == ("chat.completion", "chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == words(*range(7, 12))
    assert choice["finish_reason"] == "length"
    assert fake.added[0].sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_completion_tokens", 10**6),
        ("max_completion_tokens", 0),
        ("max_tokens", 10**6),
        ("n", 2**31 - 1),
        ("top_logprobs", 21),
    ],
)
async def test_a_number_that_a_chat_cannot_have_is_named_as_the_client_did(
    client: httpx2.AsyncClient, fake: FakeAttention, field: str, value: int
) -> None:
    body = {"messages": [{"role": "user", "content": WORDS[4]}], "logprobs": True, field: value}
    response = await client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert error["message"].startswith(f"{field}={value}: ")
    assert not fake.added


async def test_a_chats_stream_begins_each_choice_with_its_role(
    client: httpx2.AsyncClient, fake: FakeAttention
) -> None:
    found = await events(
        client, "/v1/chat/completions", messages=[{"role": "user", "content": WORDS[4]}], n=2
    )
    assert {each["object"] for each in found} == {"chat.completion.chunk"}
    assert "usage" not in found[0]
    for index in range(2):
        choices = [each["choices"][0] for each in found if each["choices"][0]["index"] == index]
        deltas = [choice["delta"] for choice in choices]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert all("role" not in delta for delta in deltas[1:])
        assert "".join(delta.get("content", "") for delta in deltas)
        assert choices[-1]["finish_reason"] == "length"


async def test_tokenize_and_back(client: httpx2.AsyncClient) -> None:
    answer = await post(client, "/tokenize", prompt=words(3, 4), return_token_strs=True)
    assert answer == {
        "count": 2,
        "max_model_len": answer["max_model_len"],
        "tokens": [3, 4],
        "token_strs": [f" {WORDS[3]}", f" {WORDS[4]}"],
    }
    assert answer["max_model_len"] > 0
    asked = await post(
        client,
        "/tokenize",
        messages=[{"role": "user", "content": WORDS[4]}],
        add_generation_prompt=False,
    )
    assert (asked["tokens"], asked["token_strs"]) == ([4], None)
    back = await post(client, "/detokenize", tokens=[3, 4])
    assert back == {"prompt": words(3, 4)}


async def test_a_client_that_goes_away_ends_its_generation(
    client: httpx2.AsyncClient, fake: FakeAttention
) -> None:
    fake.step_s = 0.05
    async with client.stream("POST", "/v1/completions", json={"prompt": [5], "stream": True}) as r:
        await anext(r.aiter_bytes())
    await fake.wait_for_abort()
    waiting = asyncio.create_task(client.post("/v1/completions", json={"prompt": [5], "n": 2}))
    while len(fake.added) < 3:
        await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait({waiting})
    await fake.wait_for_abort(3)
    several = asyncio.create_task(client.post("/v1/completions", json={"prompt": [[5], [6]]}))
    while len(fake.added) < 5:
        await asyncio.sleep(0.01)
    several.cancel()
    await asyncio.wait({several})
    await fake.wait_for_abort(5)
    assert sorted(fake.aborted) == sorted(each.sequence_id for each in fake.added)


async def test_several_prompts_are_admitted_once_each_and_run_apart(
    client: httpx2.AsyncClient, fake: FakeAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    admitted: list[GenerationRequest] = []

    def noted(request: GenerationRequest, model: ServedModel, kv_tokens: int) -> Admitted:
        admitted.append(request)
        return admit(request, model, kv_tokens)

    monkeypatch.setattr("gateway.generation.admit", noted)
    answer = await post(client, "/v1/completions", prompt=[[5], [6], [7]])
    assert [choice["text"] for choice in answer["choices"]] == [
        words(*count_up([first])) for first in (5, 6, 7)
    ]
    assert [request.prompt for request in admitted] == [(5,), (6,), (7,)]
    assert len({add.sequence_id for add in fake.added}) == 3
