"""The load against a scripted client: what goes wrong is found, counted and kept."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from epserve.chaos.checker import Outcome, Verdict
from epserve.chaos.load import MOST_KEPT, Ended, Load, Results
from epserve.chaos.requests import ChaosRequest, draw_requests
from epserve.client import Model
from epserve.generate_messages import Output, Sampling, Usage
from moe_core.errors import ConfigError, RequestError, UnavailableError

MODEL = Model("m", "deepseek_v3", max_model_len=256, vocab_size=100, has_tokenizer=False)
REQUESTS = draw_requests(MODEL, 8, max_tokens=6, seed=3)
Spoil = Callable[[list[Output]], list[Output]]


class Client:
    """Answers with tokens that follow from the prompt; `spoil` changes the answer."""

    def __init__(self) -> None:
        self.spoil: Spoil = list
        self.raises: Exception | None = None
        self.sleep_s = 0.0
        self.asked = 0
        self.running = 0
        self.most_running = 0

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        request_id: str = "",
        idle_timeout_s: float = 120.0,
    ) -> AsyncIterator[Output]:
        self.asked += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(0)
            for output in self.spoil(_answer(prompt, sampling, request_id)):
                yield output
            await asyncio.sleep(self.sleep_s)
            if self.raises is not None:
                raise self.raises
        finally:
            self.running -= 1


def _answer(prompt: str | Sequence[int], sampling: Sampling | None, name: str) -> list[Output]:
    assert sampling is not None
    first = sum(map(int, prompt))
    tokens = [first + step for step in range(sampling.max_tokens or 0)]
    usage = Usage(len(prompt), len(tokens))
    outputs = []
    for index in range(sampling.n or 1):
        outputs += [Output(name, index, (token,), "", "", None) for token in tokens[:-1]]
        outputs.append(Output(name, index, (tokens[-1],), "", "length", usage))
    return outputs


async def checked(client: Client, deadline_s: float = 5.0) -> Results:
    """One pass with the client as it is, against its answers before."""
    spoil, raises, sleep_s = client.spoil, client.raises, client.sleep_s
    client.spoil, client.raises, client.sleep_s = list, None, 0.0
    load = Load(client, REQUESTS, 4, deadline_s)
    expected = await load.quiet_results()
    client.spoil, client.raises, client.sleep_s = spoil, raises, sleep_s
    return await load.each_once(expected)


async def test_right_answers_are_exact_and_so_many_run_at_a_time():
    client = Client()
    results = await checked(client)
    assert results.outcomes == {Outcome.EXACT: len(REQUESTS)}
    assert (results.num_broken, results.errors, results.breaks) == (0, [], [])
    assert client.asked == 2 * len(REQUESTS)
    assert client.most_running == 4
    choices = sum(request.num_choices for request in REQUESTS)
    assert len(results.timeline.first_token_s) == choices
    assert results.timeline.num_tokens == choices + len(results.timeline.gaps)


@pytest.mark.parametrize(
    ("spoil", "outcome"),
    [
        (lambda outputs: [*outputs[:1], *outputs], Outcome.WRONG),  # twice
        (lambda outputs: outputs[1:], Outcome.WRONG),  # missing
        (lambda outputs: outputs[:-1], Outcome.TRUNCATED),
        (lambda outputs: [], Outcome.TRUNCATED),
    ],
)
async def test_what_is_wrong_is_found_in_every_request(spoil: Spoil, outcome: Outcome):
    client = Client()
    client.spoil = spoil
    results = await checked(client)
    assert results.outcomes == {outcome: len(REQUESTS)}
    assert results.num_broken == len(results.breaks) == len(REQUESTS)
    assert client.running == 0


async def test_an_explicit_error_after_a_right_beginning_is_counted_by_code_and_kept():
    client = Client()
    client.spoil = lambda outputs: outputs[:1]
    client.raises = UnavailableError("expert 1 was lost")
    results = await checked(client)
    assert results.outcomes == {Outcome.ERROR: len(REQUESTS)}
    assert results.error_codes == {"UNAVAILABLE": len(REQUESTS)}
    assert results.num_broken == 0
    assert results.errors[0].verdict.detail == "expert 1 was lost"


async def test_a_wrong_token_before_an_error_is_not_excused_by_it():
    client = Client()
    client.spoil = lambda outputs: outputs[1:2]
    client.raises = UnavailableError("lost")
    assert (await checked(client)).outcomes == {Outcome.WRONG: len(REQUESTS)}


async def test_a_request_that_has_not_ended_at_its_deadline_hangs():
    client = Client()
    client.spoil = lambda outputs: outputs[:1]
    client.sleep_s = 60.0
    results = await checked(client, deadline_s=0.05)
    assert results.outcomes == {Outcome.HANG: len(REQUESTS)}
    assert "1 tokens had come" in results.breaks[0].verdict.detail
    assert client.running == 0


async def test_what_is_refused_before_any_fault_is_raised():
    client = Client()
    client.raises = RequestError("max_tokens=6: too many")
    with pytest.raises(RequestError, match="too many"):
        await Load(client, REQUESTS, 4, 5.0).quiet_results()
    client.raises = None
    client.spoil = lambda outputs: outputs[:-1]
    with pytest.raises(UnavailableError, match="cut short without any fault"):
        await Load(client, REQUESTS, 4, 5.0).quiet_results()


async def test_the_load_goes_on_until_it_is_told_and_ends_what_has_begun():
    client = Client()
    load = Load(client, REQUESTS, 4, 5.0)
    expected = await load.quiet_results()
    results, stop = Results(time.monotonic()), asyncio.Event()
    running = asyncio.create_task(load.until(stop, expected, results))
    while results.outcomes.total() < 50:
        await asyncio.sleep(0.001)
    stop.set()
    await running
    assert results.outcomes == {Outcome.EXACT: client.asked - len(REQUESTS)}
    assert client.running == 0


def test_no_more_than_so_many_ends_are_kept_and_all_are_counted():
    results = Results(0.0)

    for _ in range(MOST_KEPT + 5):
        results.ended(Ended("r", REQUESTS[0], 0.5, 1.0, Verdict(Outcome.HANG)))
    assert len(results.breaks) == MOST_KEPT
    assert results.num_broken == MOST_KEPT + 5


def test_requests_follow_from_the_seed_and_are_of_all_kinds():
    assert draw_requests(MODEL, 8, max_tokens=6, seed=3) == REQUESTS
    assert draw_requests(MODEL, 8, max_tokens=6, seed=4) != REQUESTS
    assert {request.num_choices for request in REQUESTS} == {1, 2}
    assert {request.sampling.temperature == 0.0 for request in REQUESTS} == {True, False}
    assert all(_fits(request) for request in REQUESTS)


def _fits(request: ChaosRequest) -> bool:
    most = request.sampling.max_tokens or 0
    return 0 < most <= 6 and 0 < len(request.prompt) <= MODEL.max_model_len - most


def test_a_length_that_leaves_no_room_for_a_prompt_is_refused():
    with pytest.raises(ConfigError, match="max_tokens=256: leaves no room"):
        draw_requests(MODEL, 1, max_tokens=256, seed=0)
