"""What HTTP clients are told when something is wrong, and who is let in."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gateway.callers import Caller
from gateway.http.app import make_app
from gateway.http.context import caller_of
from gateway.http.host import HttpHost
from moe_core.cluster import MemberState, Role
from moe_core.errors import AuthenticationError, ConfigError, PeerTimeoutError, TooManyRequestsError
from support.fake_attention import FakeAttention
from support.http_gateway import http_side
from support.small_gateway import SmallGateway
from support.words import word_tokenizer

LIMIT = 100_000


@pytest.fixture
async def gateway() -> AsyncIterator[SmallGateway]:
    async with SmallGateway(tokenizer=word_tokenizer()) as gateway:
        yield gateway


@pytest.fixture
async def fake(gateway: SmallGateway) -> FakeAttention:
    fake = FakeAttention(lambda prompt: [7, 8, 9])
    await gateway.add_worker(Role.ATTN, fake)
    return fake


@pytest.fixture
async def client(gateway: SmallGateway) -> AsyncIterator[httpx2.AsyncClient]:
    async with http_side(gateway, max_body_bytes=LIMIT) as client:
        yield client


def error_of(response: httpx2.Response) -> dict[str, object]:
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": [5], "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": [5], "top_p": "x"}, "top_p"),
        ("/v1/completions", {"prompt": [5], "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": [5], "max_tokens": 10**6}, "max_tokens"),
        ("/v1/completions", {"prompt": [5], "suffix": "end"}, "suffix"),
        ("/v1/completions", {"prompt": [5], "logit_bias": {"5": 1e9}}, "logit_bias[5]"),
        ("/v1/completions", {"prompt": [5], "logit_bias": {"5": "a"}}, "logit_bias[5]"),
        ("/v1/completions", {"prompt": [5], "stop": [1]}, "stop[0]"),
        ("/v1/completions", {"prompt": [5], "stop": 1}, "stop"),
        ("/v1/completions", {"prompt": [5], "regex": "x+"}, "regex"),
        ("/v1/completions", {"prompt": [5], "temperature": 1e308}, "temperature"),
        ("/v1/completions", {"prompt": [5], "top_p": 1e-300}, "top_p"),
        ("/v1/completions", {"prompt": [[5], [6, 64]]}, "prompt"),
        ("/v1/completions", {"prompt": [5], "n": 65}, "n"),
        ("/v1/completions", {"prompt": [5], "n": 2**31 - 1}, "n"),
        ("/v1/completions", {"prompt": [[5]] * 1_024, "n": 5}, "n"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ("/v1/chat/completions", {"messages": [], "tools": [{}]}, "tools"),
        ("/v1/chat/completions", {"messages": [], "top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": [], "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [64]}, "tokens"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_wrong_field_is_400_and_named(
    client: httpx2.AsyncClient,
    fake: FakeAttention,
    path: str,
    body: object,
    param: str,
    stream: bool,
) -> None:
    response = await client.post(path, json={**body, "stream": stream})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param), error
    assert error["type"] == "invalid_request_error"
    assert fake.added == []


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\xff", b'{"prompt": NaN}', b'{"temperature": -Infinity}'),
        *(b'{"a":' * 9_000 + b"1" + b"}" * 9_000, b'{"seed": ' + b"9" * 50_000 + b"}"),
        *(b'{"prompt": "\\ud800"}', b'"text"'),
    ],
    ids=lambda content: content[:20],
)
async def test_a_body_that_is_no_json_object_is_400(
    client: httpx2.AsyncClient, content: bytes
) -> None:
    response = await client.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert "the body" in error_of(response)["message"]


async def test_no_messages_is_said_before_that_the_model_has_no_template(
    client: httpx2.AsyncClient,
) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": []})
    message = "messages: must be a list of messages that is not empty"
    assert error_of(response)["message"] == message
    messages = [{"role": "user", "content": "x"}]
    response = await client.post("/v1/chat/completions", json={"messages": messages})
    assert "has no chat template" in str(error_of(response)["message"])


async def test_options_of_a_stream_need_one(client: httpx2.AsyncClient) -> None:
    body = {"prompt": [5], "stream_options": {"include_usage": True}}
    error = error_of(await client.post("/v1/completions", json=body))
    assert (error["param"], error["message"]) == (
        "stream_options",
        "stream_options: needs stream=true",
    )


async def test_a_value_is_shown_as_json_has_it(client: httpx2.AsyncClient) -> None:
    for value, shown in ((None, "null"), (True, "true"), ("x", "'x'")):
        response = await client.post("/detokenize", json={"tokens": value})
        assert str(error_of(response)["message"]).startswith(f"tokens={shown}: input should be")


async def test_a_body_over_the_limit_is_413_and_not_read(client: httpx2.AsyncClient) -> None:
    response = await client.post("/v1/completions", content=b"x" * (LIMIT + 1))
    assert response.status_code == 413
    assert "100001 bytes; at most 100000" in error_of(response)["message"]

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 10_000

    response = await client.post("/v1/completions", content=endless())
    assert response.status_code == 413


async def test_other_models_paths_and_methods_have_the_same_shape(
    client: httpx2.AsyncClient,
) -> None:
    response = await client.post("/v1/completions", json={"prompt": [5], "model": "other"})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    for name in ("", "other/one"):
        assert (await client.get(f"/v1/models/{name}")).status_code == 404
    response = await client.get("/v1/nothing")
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
    response = await client.get("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert "takes POST" in error_of(response)["message"]


async def test_an_engine_that_is_not_there_is_503(client: httpx2.AsyncClient) -> None:
    for stream in (False, True):
        response = await client.post("/v1/completions", json={"prompt": [5], "stream": stream})
        error = error_of(response)
        assert (response.status_code, error["code"]) == (503, "unavailable")
        assert "no attention group can take a request" in error["message"]


@pytest.mark.parametrize(
    ("code", "status"),
    [("UNAVAILABLE", 503), ("DEADLINE_EXCEEDED", 504), ("INTERNAL", 500), ("UNKNOWN", 500)],
)
async def test_what_fails_before_the_first_token_has_its_own_status(
    client: httpx2.AsyncClient, fake: FakeAttention, code: str, status: int
) -> None:
    fake.error = (code, "expert 3 is gone")
    for stream in (False, True):
        response = await client.post("/v1/completions", json={"prompt": [5], "stream": stream})
        assert response.status_code == status
        assert "expert 3 is gone" in error_of(response)["message"]


async def test_what_fails_later_ends_the_stream_with_an_event(
    client: httpx2.AsyncClient, fake: FakeAttention
) -> None:
    fake.step_s = 0.05
    request = {"prompt": [5], "stream": True}
    async with client.stream("POST", "/v1/completions", json=request) as response:
        parts = response.aiter_text()
        assert "text" in await anext(parts)
        fake.error = ("UNAVAILABLE", "expert 3 is gone")
        rest = [part async for part in parts]
    last = json.loads("".join(rest).split("\n\n")[-2].removeprefix("data: "))
    assert last["error"]["message"] == "expert 3 is gone"
    assert last["error"]["code"] == "unavailable"


async def test_an_unforeseen_error_tells_nothing_of_the_program(
    gateway: SmallGateway, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "generator", None)

    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("gateway.http.completions.prompts_of", broken)
    response = await client.post("/v1/completions", json={"prompt": [5]})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["code"] == "internal_error"


async def test_only_those_who_are_known_are_let_in(
    gateway: SmallGateway, fake: FakeAttention
) -> None:
    def authenticate(authorization: str | None) -> Caller:
        if authorization == "Bearer busy":
            raise TooManyRequestsError("2 requests at once are the limit", retry_after_s=1.2)
        if authorization != "Bearer good":
            raise AuthenticationError("this API key is not known here")
        return Caller("good")

    async def who(request: Request) -> JSONResponse:
        return JSONResponse(caller_of(request).name)

    extra = [Route("/metrics", who)]
    async with http_side(gateway, authenticate=authenticate, extra_routes=extra) as client:
        for path in ("/v1/models", "/version", "/metrics", "/nowhere"):
            response = await client.get(path)
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503
        response = await client.get("/v1/models", headers={"authorization": "Bearer busy"})
        assert (response.status_code, response.headers["retry-after"]) == (429, "2")
        response = await client.get("/metrics", headers={"authorization": "Bearer good"})
        assert response.json() == "good"


async def test_ready_says_what_is_missing(
    gateway: SmallGateway, client: httpx2.AsyncClient
) -> None:
    response = await client.get("/ready")
    assert response.status_code == 503
    assert any("attn 0" in each for each in response.json()["missing"])
    gateway.registry.set_gateway(MemberState.READY)
    response = await client.get("/ready")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


async def test_models_and_version(client: httpx2.AsyncClient) -> None:
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert (card["id"], card["object"]) == ("small", "model")
    assert (await client.get("/v1/models/small")).json() == card
    assert (await client.get("/version")).json()["version"]


async def test_a_port_that_is_taken_is_named(gateway: SmallGateway) -> None:
    app = make_app(gateway.generator, gateway.registry)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^port={port}: .*in use"):
            await HttpHost().start(app, "127.0.0.1", port)


async def test_stop_gives_a_stream_its_grace_and_then_ends_it(
    gateway: SmallGateway, fake: FakeAttention
) -> None:
    fake.step_s = 0.1
    host = HttpHost()
    port = await host.start(make_app(gateway.generator, gateway.registry), "127.0.0.1", 0)
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        asked = asyncio.create_task(client.post("/v1/completions", json={"prompt": [5]}))
        while not fake.added:
            await asyncio.sleep(0.01)
        await host.stop(5)
        assert (await asked).json()["usage"]["completion_tokens"] == 3
        with pytest.raises(httpx2.ConnectError):
            await client.get("/health")


async def test_a_deadline_is_504(gateway: SmallGateway) -> None:
    def late(authorization: str | None) -> Caller:
        raise PeerTimeoutError("expert 1 has not answered within 2 s")

    async with http_side(gateway, authenticate=late) as client:
        assert (await client.get("/v1/models")).status_code == 504
