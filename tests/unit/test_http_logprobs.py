"""Logprobs in the shapes of both APIs."""

import math

from gateway.http.logprobs import CompletionLogprobs, TokenNames, chat_logprobs
from gateway.requests import TokenLogprobs
from support.words import WORDS, word_tokenizer

NAMES = TokenNames(word_tokenizer())
ENTRIES = [
    TokenLogprobs(5, -1.5, 3, (6, 7), (-0.5, -1.0)),
    TokenLogprobs(6, -0.25, 1, (6, 7), (-0.25, -math.inf)),
]


class SameNames(TokenNames):
    def text(self, token_id: int) -> str:
        return "�"


def test_a_completion_tells_the_token_and_the_likeliest_and_where_each_begins() -> None:
    five, six, seven = (f" {WORDS[token]}" for token in (5, 6, 7))
    shape = CompletionLogprobs(NAMES)
    assert shape.shape(ENTRIES) == {
        "tokens": [five, six],
        "token_logprobs": [-1.5, -0.25],
        "top_logprobs": [{five: -1.5, six: -0.5, seven: -1.0}, {six: -0.25, seven: -9999.0}],
        "text_offset": [0, len(five)],
    }
    assert shape.shape(ENTRIES[:1])["text_offset"] == [len(five + six)]


def test_a_prompts_first_token_has_no_logprob() -> None:
    shape = CompletionLogprobs(NAMES).shape([None, ENTRIES[0]], first_id=7)
    assert shape["tokens"] == [f" {WORDS[7]}", f" {WORDS[5]}"]
    assert (shape["token_logprobs"], shape["top_logprobs"][0]) == ([None, -1.5], None)


def test_tokens_of_the_same_text_do_not_hide_each_other() -> None:
    (top, _) = CompletionLogprobs(SameNames(None)).shape(ENTRIES)["top_logprobs"]
    assert top == {"�": -1.5, "token_id:6": -0.5, "token_id:7": -1.0}


def test_without_a_tokenizer_tokens_are_named_by_id() -> None:
    assert CompletionLogprobs(TokenNames(None)).shape(ENTRIES)["tokens"] == [
        "token_id:5",
        "token_id:6",
    ]


def test_chat_tells_bytes_too() -> None:
    (first, _) = chat_logprobs(NAMES, ENTRIES)["content"]
    assert first["token"] == f" {WORDS[5]}"
    assert bytes(first["bytes"]).decode() == first["token"]
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -1.0]
