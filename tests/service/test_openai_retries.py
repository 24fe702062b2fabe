"""OpenAI's own client comes back by itself after a refusal that will pass."""

from collections.abc import AsyncIterator

import openai
import pytest

from gateway.callers import ANONYMOUS, Caller
from moe_core.cluster import Role
from moe_core.errors import EpserveError, TooManyRequestsError, UnavailableError
from support.fake_attention import FakeAttention
from support.http_gateway import http_side
from support.small_gateway import SmallGateway


@pytest.fixture
async def gateway() -> AsyncIterator[SmallGateway]:
    async with SmallGateway() as gateway:
        await gateway.add_worker(Role.ATTN, FakeAttention(lambda prompt: [7, 8, 9]))
        yield gateway


class RefusesFirst:
    """Lets everybody in who has been refused with `error` once."""

    def __init__(self, error: EpserveError) -> None:
        self.calls = 0
        self._error = error

    def __call__(self, authorization: str | None) -> Caller:
        self.calls += 1
        if self.calls == 1:
            raise self._error
        return ANONYMOUS


@pytest.mark.parametrize(
    "error",
    [TooManyRequestsError("2 requests are the limit", 0.5), UnavailableError("no expert 3")],
    ids=["429", "503"],
)
async def test_a_refused_request_is_sent_again(gateway: SmallGateway, error: EpserveError) -> None:
    guard = RefusesFirst(error)
    async with http_side(gateway, authenticate=guard) as http:
        url = f"{http.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=1) as client:
            answer = await client.completions.create(model="small", prompt=[5], max_tokens=3)
    assert guard.calls == 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


async def test_a_wrong_request_is_not_sent_again(gateway: SmallGateway) -> None:
    asked = RefusesFirst(UnavailableError("only counts"))
    asked.calls = 1
    async with http_side(gateway, authenticate=asked) as http:
        url = f"{http.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=2) as client:
            with pytest.raises(openai.BadRequestError, match="temperature"):
                await client.completions.create(model="small", prompt=[5], temperature=-1)
    assert asked.calls == 2
