"""Logprobs in the shapes of both APIs."""

import math
from pathlib import Path

import pytest

from gateway.http.logprobs import CompletionLogprobs, TokenNames, chat_logprobs
from gateway.requests import TokenLogprobs
from gateway.tokenizer import INCOMPLETE, TextTokenizer
from support.fallback_tokenizer import fallback_tokenizer
from support.words import WORDS, word_tokenizer

TINY = Path(__file__).parents[2] / "epserve" / "tiny_model"
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
        "text_offset": [0, len(WORDS[5])],
    }
    assert shape.shape(ENTRIES[:1])["text_offset"] == [len(WORDS[5] + six)]


def test_tokens_of_the_same_text_do_not_hide_each_other() -> None:
    (top, _) = CompletionLogprobs(SameNames(None)).shape(ENTRIES)["top_logprobs"]
    assert top == {"�": -1.5, "token_id:6": -0.5, "token_id:7": -1.0}


def test_without_a_tokenizer_tokens_are_named_by_id() -> None:
    assert CompletionLogprobs(TokenNames(None)).shape(ENTRIES)["tokens"] == [
        "token_id:5",
        "token_id:6",
    ]


@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_are_those_of_the_text_whatever_tokens_are_called(as_ids: bool) -> None:
    tokenizer = TextTokenizer.from_directory(TINY)
    assert tokenizer is not None
    text = "日本 a"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text), "a character of several tokens"
    entries = [TokenLogprobs(token, -1.0, 1, (), ()) for token in ids]
    shape = CompletionLogprobs(TokenNames(tokenizer, as_ids=as_ids))
    offsets = [
        *shape.shape(entries[1:3], prompt=ids[:3])["text_offset"],
        *shape.shape(entries[3:])["text_offset"],
    ]
    assert tokenizer.decode(ids[:3]) == text[0]
    whole = [tokenizer.decode(ids[:count]).rstrip(INCOMPLETE) for count in range(len(ids))]
    assert offsets == list(map(len, whole))


@pytest.mark.parametrize("tokenizer", [TextTokenizer.from_directory(TINY), fallback_tokenizer()])
def test_bytes_of_tokens_make_the_text_also_within_a_character(tokenizer: TextTokenizer) -> None:
    text = "a 本🎉"
    entries = [
        TokenLogprobs(token, -1.0, 1, (), ())
        for token in tokenizer.encode(text, add_special_tokens=False)
    ]
    content = chat_logprobs(TokenNames(tokenizer), entries)["content"]
    parts = [bytes(each["bytes"]) for each in content]
    assert b"".join(parts).decode().strip() == tokenizer.decode([e.token_id for e in entries])
    assert any(each["token"] == INCOMPLETE for each in content)


def test_without_a_tokenizer_all_begin_where_the_text_does() -> None:
    assert CompletionLogprobs(TokenNames(None)).shape(ENTRIES)["text_offset"] == [0, 0]


def test_chat_tells_bytes_too() -> None:
    (first, _) = chat_logprobs(NAMES, ENTRIES)["content"]
    assert first["token"] == f" {WORDS[5]}"
    assert bytes(first["bytes"]).decode() == first["token"]
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -1.0]
