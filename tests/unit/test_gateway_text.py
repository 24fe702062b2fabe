"""Text out of tokens, piece by piece, and stop strings in it."""

import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gateway.attention_pool import Delta
from gateway.generation import SequenceOutput
from gateway.requests import Sequence
from gateway.stop_strings import StopStrings
from gateway.tokenizer import Detokenizer, TextTokenizer
from moe_core.errors import ConfigError
from support.words import word_tokenizer


@cache
def byte_tokenizer() -> TextTokenizer:
    """One token per byte, some merged across characters' borders, and a special one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng = random.Random(7)
    pairs = {rng.choice(alphabet) + rng.choice(alphabet) for _ in range(200)}
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *sorted(pairs)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return TextTokenizer(tokenizer)


def pieces(tokenizer: TextTokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.integers(0, 456), max_size=40))
def test_pieces_of_any_tokens_join_to_the_whole_text(token_ids: list[int]) -> None:
    tokenizer = byte_tokenizer()
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.text(max_size=20))
def test_no_piece_of_real_text_holds_half_a_character(text: str) -> None:
    tokenizer = byte_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    token_ids = [
        alphabet.index(char) for part, _ in encoded.pre_tokenize_str(text) for char in part
    ]
    found = pieces(tokenizer, token_ids)
    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 63), max_size=12))
def test_leading_spaces_of_words_survive(token_ids: list[int]) -> None:
    tokenizer = word_tokenizer()
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def naive(text: str, strings: list[str]) -> tuple[str, bool]:
    """The first stop string that is complete, found by trying every end."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in strings if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(derandomize=True, max_examples=500)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_however_the_text_is_cut(
    parts: list[str], strings: list[str]
) -> None:
    search, shown, found = StopStrings(strings), "", False
    for part in parts:
        text, found = search.push(part)
        shown += text
        if found:
            break
    if not found:
        shown += search.flush()
    assert (shown, found) == naive("".join(parts), strings)


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    search = StopStrings(["END"])
    assert search.push("the E") == ("the ", False)
    assert search.push("N") == ("", False)
    assert search.push("T") == ("ENT", False)
    assert search.flush() == ""


def sequence(**changes: object) -> Sequence:
    values = {
        "request_id": "r",
        "prompt_ids": (5,),
        "max_tokens": 9,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 0,
        "stop_token_ids": (),
        "min_tokens": 0,
        "stop": (),
        "priority": 0,
    }
    return Sequence(**{**values, **changes})  # type: ignore[arg-type]


def test_tokens_after_a_stop_string_in_the_same_step_are_cut_off() -> None:
    output = SequenceOutput(sequence(stop=("bx",)), word_tokenizer())
    chunk = output.push(Delta((2, 3, 4, 5), "length"))
    assert (chunk.text, chunk.token_ids, chunk.finish_reason) == ("waax wa", (2, 3), "stop")
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == 2


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    output = SequenceOutput(sequence(stop=("waax",), min_tokens=2), word_tokenizer())
    assert output.push(Delta((2,))).text == "waax"
    assert output.push(Delta((2,))).finish_reason == "stop"


def test_held_back_text_comes_with_the_last_chunk() -> None:
    output = SequenceOutput(sequence(stop=("waax never",)), word_tokenizer())
    assert output.push(Delta((2,))).text == ""
    assert output.push(Delta((), "length")).text == "waax"


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    chunk = SequenceOutput(sequence(), None).push(Delta((2, 3), "length"))
    assert (chunk.text, chunk.token_ids) == ("", (2, 3))


def test_unreadable_tokenizer_is_a_config_error_naming_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        TextTokenizer.from_directory(tmp_path)
    assert TextTokenizer.from_directory(tmp_path / "elsewhere") is None
