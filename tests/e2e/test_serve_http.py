"""A served model through OpenAI's own client, and what is left when a client goes away."""

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.processes import TINY_MODEL, serving
from support.served_cluster import DEADLINE_S, ServedCluster, connected

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LONG = {"prompt": [5, 6, 7], "max_tokens": 900, "extra_body": {"ignore_eos": True}}


STEP_PARTS = ("attention", "dispatch", "expert_wait", "combine", "sampling", "other")


@dataclass(frozen=True)
class Served:
    url: str
    cluster: ServedCluster

    def scraped(self) -> dict[tuple[str, str], float]:
        """Of `/metrics`, by name and by the label `part`, if it has one."""
        text = httpx2.get(f"{self.url}/metrics").text
        samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
        return {(s.name, s.labels.get("part", "")): s.value for s in samples}

    def wait_until_idle(self) -> None:
        """Long before the 900 tokens of a LONG request could have been generated."""
        assert self.cluster.settled().is_idle

    def wait_until_busy(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self._num_running() == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def _num_running(self) -> int:
        return sum(
            member.attention_load.num_running
            for member in self.cluster.state.members
            if member.attention_load is not None
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = tmp_path_factory.mktemp("chatty") / "chatty"
    shutil.copytree(TINY_MODEL, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with (
        serving("--kv-cache-tokens", "4096", model=model) as (running, target),
        connected(target) as cluster,
    ):
        (url,) = re.findall(r"(http://127\.0\.0\.1:\d+) \(HTTP\)", "\n".join(running.out))
        yield Served(url, cluster)


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S
    ) as client:
        yield client


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "chatty"
    assert client.models.retrieve("chatty").id == "chatty"


def test_a_completion_is_the_same_streamed_or_not(client: openai.OpenAI) -> None:
    asked = {"model": "chatty", "prompt": "Return a list of", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2)
    (choice,) = whole.choices
    assert whole.usage.completion_tokens == len(choice.logprobs.tokens) <= 24
    assert "".join(choice.logprobs.tokens).startswith(choice.text)
    assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs)
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *parts, last = list(stream)
    assert "".join(part.choices[0].text for part in parts) == choice.text
    assert parts[-1].choices[0].finish_reason == choice.finish_reason
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_chat_goes_through_the_template(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Return a list of"}]
    asked = {"max_completion_tokens": 16, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(model="chatty", messages=messages, **asked)
    (choice,) = whole.choices
    assert choice.logprobs.content[0].top_logprobs[0].logprob <= 0
    stream = client.chat.completions.create(model="chatty", messages=messages, **asked, stream=True)
    deltas = [part.choices[0].delta for part in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    prompt = "user: Return a list of\nassistant:"
    same = client.completions.create(model="chatty", prompt=prompt, max_tokens=16, temperature=0)
    assert same.choices[0].text == choice.message.content
    assert same.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    asked = {"prompt": "Return", "max_tokens": 12, "n": 3, "seed": 11, "temperature": 2.0}
    first, again = (client.completions.create(model="chatty", **asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="chatty", prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="chatty",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_blocks(
    served: Served, client: openai.OpenAI, stream: bool
) -> None:
    if stream:
        with client.completions.create(model="chatty", stream=True, n=2, **LONG) as parts:
            next(iter(parts))
            served.wait_until_busy()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).completions.create(model="chatty", n=2, **LONG)
    served.wait_until_idle()


def test_health_ready_and_version(served: Served) -> None:
    for path in ("/health", "/ready", "/version"):
        assert httpx2.get(served.url + path).status_code == 200


def test_a_scrape_tells_of_the_engine_and_where_its_time_went(
    served: Served, client: openai.OpenAI
) -> None:
    before = served.scraped()
    asked = {"prompt": list(range(100, 140)), "max_tokens": 8, "temperature": 0}
    for _ in range(2):  # the second finds the first's blocks
        client.completions.create(model="chatty", extra_body={"ignore_eos": True}, **asked)
    served.wait_until_idle()
    after = served.scraped()

    def grown(name: str, part: str = "") -> float:
        return after[f"epserve_{name}", part] - before[f"epserve_{name}", part]

    assert (grown("steps_total"), grown("prefix_cache_queries_total")) == (16, 80)
    assert grown("prefix_cache_hits_total") == 40 // 16 * 16
    parts = [grown("step_part_seconds_total", part) for part in STEP_PARTS]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(grown("step_seconds_total"))
    assert min(grown("expert_seconds_total", part) for part in ("queue", "compute")) > 0
    for name in ("num_requests_running", "num_requests_waiting", "num_preemptions_total"):
        assert after[f"epserve_{name}", ""] == 0
    assert after["epserve_kv_cache_usage_perc", ""] == 0
