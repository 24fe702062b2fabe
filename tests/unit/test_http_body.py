"""What of a body is taken, and how the rest is refused."""

import pytest

from gateway.admission import ServedModel
from gateway.http.body import parse
from gateway.http.chat import ChatBody
from gateway.http.completions import CompletionBody
from gateway.http.messages import read_messages
from gateway.http.prompts import read_prompts
from gateway.http.sampling_fields import NOT_SERVED, refuse_unserved
from moe_core.errors import RequestError
from support.small_gateway import MODEL
from support.words import WORDS, word_tokenizer

SERVED = ServedModel("small", MODEL, word_tokenizer())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": "1"}, r"^n='1': input should be a valid integer"),
        ({"n": True}, r"^n=true: "),
        ({"n": 1.0}, r"^n=1.0: "),
        ({"n": 10**30}, r"^n=10{30}: "),
        ({"temperature": float("inf")}, r"^temperature=inf: input should be a finite number"),
        ({"stream_options": {"include_usage": 1}}, r"^stream_options.include_usage=1: "),
        ({"stop_token_ids": [1, "x"]}, r"^stop_token_ids\[1\]='x': "),
        ({"max_tokens": -1}, r"^max_tokens=-1: "),
        ({"logprobs": -1}, r"^logprobs=-1: "),
    ],
)
def test_a_wrong_field_is_named_with_its_value(values: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse(CompletionBody, values)
    assert caught.value.field == str(caught.value).partition("=")[0]


def test_a_long_value_is_cut_short_in_its_message() -> None:
    with pytest.raises(RequestError) as caught:
        parse(ChatBody, {"temperature": "x" * 100_000})
    assert len(str(caught.value)) < 200


def test_fields_that_are_unknown_are_ignored() -> None:
    body = parse(ChatBody, {"store": True, "metadata": {"a": "b"}, "user": "me", "seed": 5})
    assert body.seed == 5


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_would_change_the_output_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}: is not supported") as caught:
        refuse_unserved({name: {"type": "json_object"}})
    assert caught.value.field == name
    refuse_unserved({name: None})
    for neutral in NOT_SERVED[name]:
        refuse_unserved({name: neutral})


def test_sampling_fields_become_a_sampling() -> None:
    body = parse(
        CompletionBody,
        {"stop": "a", "logit_bias": {"15": -2.5}, "seed": -1, "top_k": -1, "temperature": 0},
    )
    sampling = body.to_sampling(7, 2)
    assert (sampling.stop, sampling.logit_bias, sampling.temperature) == (("a",), {15: -2.5}, 0)
    assert (sampling.seed, sampling.top_k) == (2**64 - 1, 0)
    assert (sampling.max_tokens, sampling.logprobs) == (7, 2)


@pytest.mark.parametrize("key", ["x", "-1", "1" * 30, "1.5", "²", ""])
def test_a_bias_of_no_token_is_refused(key: str) -> None:
    with pytest.raises(RequestError, match=r"^logit_bias: the key"):
        parse(CompletionBody, {"logit_bias": {key: 1.0}}).to_sampling(1, None)


def test_a_prompt_has_four_forms() -> None:
    text = f"{WORDS[3]} {WORDS[4]}"

    def ids(value: object) -> list[tuple[int, ...]]:
        return [prompt.token_ids for prompt in read_prompts(value, SERVED)]

    assert ids(text) == [(3, 4)]
    assert ids([text, WORDS[5]]) == [(3, 4), (5,)]
    assert ids([3, 4]) == [(3, 4)]
    assert ids([[3, 4], [5]]) == [(3, 4), (5,)]
    assert read_prompts([3, 4], SERVED)[0].text == ""
    assert read_prompts([3, 4], SERVED, echo=True)[0].text == text


@pytest.mark.parametrize(
    "value",
    [
        *(None, 5, {}, [], [[]], [None], [True], [1.5], [[1, "a"]], [[[1]]], [1, [2]]),
        *([-1], [64], [10**30], [1] * 100_000, "x" * 1_000_000, [[1]] * 1_025),
    ],
    ids=lambda value: str(value)[:20],
)
def test_anything_else_is_no_prompt(value: object) -> None:
    with pytest.raises(RequestError, match=r"^prompt: "):
        read_prompts(value, SERVED)


def test_an_empty_text_is_refused_as_the_prompt() -> None:
    with pytest.raises(RequestError, match=r"^prompt: must have at least one token"):
        read_prompts("", SERVED)


def test_too_long_a_text_is_told_the_limit_and_why() -> None:
    with pytest.raises(RequestError) as caught:
        read_prompts("x" * 1_000_000, SERVED)
    most = MODEL.max_position_embeddings
    assert str(caught.value).startswith(
        f"prompt: has 1000000 characters; the model takes at most {most} tokens (max_position"
    )


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(RequestError, match=r"^prompt: send token ids; model 'small' has no"):
        read_prompts("once", ServedModel("small", MODEL, None))


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = read_messages(
        [{"role": "user", "content": parts, "name": "Ann", "more": 1}, {"role": "assistant"}]
    )
    assert messages == [
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        (None, "messages"),
        ([], "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
)
def test_a_message_that_no_template_can_show_is_named(messages: object, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_messages(messages)
    assert caught.value.field == field
