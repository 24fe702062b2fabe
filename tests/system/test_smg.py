"""A real smg in front of a real cluster: the tokens it gives are those of epserve's own service."""

import json
import shutil
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

from gateway.tokenizer import TextTokenizer
from support.processes import TINY_MODEL, serving
from support.served_cluster import DEADLINE_S, ServedCluster, connected, greedy
from support.smg import Smg, smg_in_front

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPTS = ("The for statement", "A class is", "Once", "def function(", "The list", "Note that")
MAX_TOKENS = 12
GREEDY = {"model": "chatty", "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Both:
    """smg, and the cluster that it drives."""

    smg: Smg
    cluster: ServedCluster
    tokenizer: TextTokenizer

    def tokens(self, prompt: str) -> list[int]:
        """By epserve's own service."""
        return self.cluster.generate(greedy(self.tokenizer.encode(prompt), MAX_TOKENS))

    def text(self, prompt: str) -> str:
        return self.tokenizer.decode(self.tokens(prompt))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    model = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(TINY_MODEL, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = TextTokenizer.from_directory(model)
    assert tokenizer is not None
    layout = ("--expert-devices", "2", "--ep-size", "2", "--dtype", "float64")
    with (
        serving(*layout, model=model) as (_, target),
        smg_in_front(target, model, model.parent / "smg.log") as smg,
        connected(target) as cluster,
    ):
        yield Both(smg, cluster, tokenizer)


def chat(prompt: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": prompt}]}


def test_completion(both: Both) -> None:
    answer = both.smg.post("/v1/completions", {**GREEDY, "prompt": PROMPTS[0]})
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (both.text(PROMPTS[0]), "length")
    usage = answer["usage"]
    prompt_tokens = len(both.tokenizer.encode(PROMPTS[0]))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt_tokens, MAX_TOKENS)


def test_streamed_completion(both: Both) -> None:
    body = {**GREEDY, "prompt": PROMPTS[0], "stream_options": {"include_usage": True}}
    *events, last = both.smg.post_stream("/v1/completions", body)
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    assert text == both.text(PROMPTS[0])
    assert len(events) > MAX_TOKENS / 2
    assert last["usage"]["completion_tokens"] == MAX_TOKENS


def test_generate_gives_the_same_token_ids(both: Both) -> None:
    sampling = {"max_new_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    body = {"model": "chatty", "text": PROMPTS[1], "sampling_params": sampling}
    (answer,) = both.smg.post("/generate", body)
    assert answer["output_ids"] == both.tokens(PROMPTS[1])


def test_chat(both: Both) -> None:
    answer = both.smg.post("/v1/chat/completions", {**GREEDY, **chat(PROMPTS[1])})
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == both.text(PROMPTS[1])
    assert choice["finish_reason"] == "length"


def test_streamed_chat(both: Both) -> None:
    events = both.smg.post_stream("/v1/chat/completions", {**GREEDY, **chat(PROMPTS[1])})
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == both.text(PROMPTS[1])


def test_several_at_once_each_get_their_own(both: Both) -> None:
    def complete(prompt: str) -> str:
        answer = both.smg.post("/v1/completions", {**GREEDY, "prompt": prompt})
        return str(answer["choices"][0]["text"])

    def stream(prompt: str) -> str:
        events = both.smg.post_stream("/v1/completions", {**GREEDY, "prompt": prompt})
        return "".join(choice["text"] for event in events for choice in event["choices"])

    with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
        whole, streamed = pool.map(complete, PROMPTS), pool.map(stream, PROMPTS)
        expected = [both.text(prompt) for prompt in PROMPTS]
        assert [list(whole), list(streamed)] == [expected, expected]


def test_two_choices(both: Both) -> None:
    answer = both.smg.post("/v1/completions", {**GREEDY, "prompt": PROMPTS[2], "n": 2})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["text"] for choice in answer["choices"]] == [both.text(PROMPTS[2])] * 2


def test_a_stop_string_is_cut_off(both: Both) -> None:
    text = both.text(PROMPTS[0])
    stop = text[len(text) // 2 :][:4]
    body = {**GREEDY, "prompt": PROMPTS[0], "stop": [stop]}
    (choice,) = both.smg.post("/v1/completions", body)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_log_probabilities(both: Both) -> None:
    body = {**GREEDY, **chat(PROMPTS[1]), "logprobs": True, "top_logprobs": 2}
    (choice,) = both.smg.post("/v1/chat/completions", body)["choices"]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == MAX_TOKENS
    for token in tokens:
        assert token["logprob"] <= 0
        assert token["top_logprobs"][0]["token"] == token["token"]
        assert len(token["top_logprobs"]) == 2


def test_logprobs_of_the_prompt(both: Both) -> None:
    """smg has no way to ask for them: by its protocol alone, against epserve's own service."""
    prompt = both.tokenizer.encode(PROMPTS[3])
    own = greedy(prompt, 1)
    own.sampling.prompt_logprobs = 2
    (first, *_) = both.cluster.stub.Generate(own, timeout=DEADLINE_S)
    asked = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=prompt),
        sampling_params=pb.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=2),
    )
    stub = vllm_engine_pb2_grpc.VllmEngineStub(both.cluster.channels["gateway"])
    (answer,) = stub.Generate(asked, timeout=DEADLINE_S)
    told = answer.complete.input_logprobs
    assert list(told.token_ids) == list(prompt)
    assert not told.token_logprobs[0].HasField("value")
    values = [each.value for each in told.token_logprobs[1:]]
    assert values == pytest.approx([each.logprob for each in first.prompt_logprobs])
    assert [list(each.token_ids) for each in told.top_logprobs] == [
        [],
        *(list(each.top_token_ids) for each in first.prompt_logprobs),
    ]


def test_what_is_refused_reaches_the_client_by_name(both: Both) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        both.smg.post("/v1/completions", {**GREEDY, "prompt": "Once", "regex": "a+"})
    assert caught.value.code == 400
    assert (
        "sampling_params.regex: structured outputs" in json.load(caught.value)["error"]["message"]
    )


def test_nothing_is_left_under_way(both: Both) -> None:
    assert both.cluster.settled().is_idle
