"""Text out of tokens, piece by piece, and stop strings in it."""

import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gateway.stop_strings import StopStrings
from gateway.tokenizer import Detokenizer, TextTokenizer
from moe_core.errors import ConfigError
from support.fallback_tokenizer import FALLBACK_PIECES, FALLBACK_WORDS, fallback_tokenizer
from support.naive_stop import naive
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


@cache
def tiny_tokenizer() -> TextTokenizer:
    tokenizer = TextTokenizer.from_directory(Path(__file__).parents[2] / "epserve" / "tiny_model")
    assert tokenizer is not None
    return tokenizer


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.integers(0, 2047), max_size=40))
def test_pieces_of_the_bundled_tokenizers_tokens_join_to_the_whole_text(
    token_ids: list[int],
) -> None:
    tokenizer = tiny_tokenizer()
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_a_token_stands_alone_only_where_tokens_are_bytes_and_it_is_whole_characters() -> None:
    tokenizer, alphabet = byte_tokenizer(), sorted(pre_tokenizers.ByteLevel.alphabet())
    assert tokenizer.whole_text(alphabet.index("a")) == "a"
    assert tokenizer.whole_text(456) == ""  # a special one
    half = "\u00c3"  # stands for the byte 0xC3, with which a character begins
    assert tokenizer.whole_text(alphabet.index(half)) is None
    assert word_tokenizer().whole_text(5) is None  # has a space or none
    assert fallback_tokenizer().whole_text(4) is None


def fallback_ids(text: str) -> list[int]:
    ids: list[int] = []
    for char in text:
        known = "▁" if char == " " else char
        names = [known] if known in FALLBACK_WORDS else [f"<0x{b:02X}>" for b in char.encode()]
        ids += [FALLBACK_PIECES.index(name) for name in names]
    return ids


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.text(st.sampled_from(" b日é本😀ßñ▁") | st.characters(codec="utf-8"), max_size=20))
def test_text_in_byte_tokens_comes_whole_and_no_piece_holds_half_a_character(text: str) -> None:
    tokenizer = fallback_tokenizer()
    token_ids = fallback_ids(text)
    found = pieces(tokenizer, token_ids)
    assert "".join(found) == tokenizer.decode(token_ids)
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.sampled_from(range(len(FALLBACK_WORDS))), max_size=30))
def test_pieces_of_tokens_with_spaces_on_either_side_join_to_the_whole_text(
    token_ids: list[int],
) -> None:
    tokenizer = fallback_tokenizer()
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_a_wrong_byte_does_not_take_back_characters_before_it() -> None:
    """The decoder turns the whole run of bytes into replacement characters."""
    token_ids = [*fallback_ids("ñ"), FALLBACK_PIECES.index("<0xFF>"), *fallback_ids("b")]
    assert fallback_tokenizer().decode(token_ids) == "\ufffd" * 3 + "b"
    assert "".join(pieces(fallback_tokenizer(), token_ids)) == "ñ\ufffdb"


def test_tokens_without_text_are_not_kept_and_the_space_after_them_is() -> None:
    tokenizer = fallback_tokenizer()
    word, end = FALLBACK_PIECES.index("▁the"), FALLBACK_PIECES.index("</s>")
    token_ids = [word, *[end] * 1000, word]
    detokenizer = Detokenizer(tokenizer)
    found = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(found) == "the the"
    assert len(detokenizer._window) < 100


def test_bytes_that_never_make_a_character_are_given_out_in_time() -> None:
    tokenizer = fallback_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    wrong = FALLBACK_PIECES.index("<0xFF>")
    found = "".join(detokenizer.push(wrong) for _ in range(1000))
    assert len(found) > 900
    assert len(found + detokenizer.flush()) == 1000


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


@settings(derandomize=True, max_examples=500)
@given(
    early=st.lists(st.text("ab", max_size=4), max_size=4),
    later=st.lists(st.text("ab", max_size=4), max_size=6),
    strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_may_begin_but_not_end_before_stopping_is_allowed(
    early: list[str], later: list[str], strings: list[str]
) -> None:
    search = StopStrings(strings)
    shown = "".join(search.push(part, may_stop=False)[0] for part in early)
    found = False
    for part in later:
        text, found = search.push(part)
        shown += text
        if found:
            break
    if not found:
        shown += search.flush()
    whole, begin = "".join(early + later), len("".join(early))
    ends = (end for end in range(begin + 1, len(whole) + 1) if whole[:end].endswith(tuple(strings)))
    end = next(ends, None)
    if end is None:
        assert (shown, found) == (whole, False)
    else:
        longest = max(len(string) for string in strings if whole[:end].endswith(string))
        assert (shown, found) == (whole[: end - longest], True)


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    search = StopStrings(["END"])
    assert search.push("the E") == ("the ", False)
    assert search.push("N") == ("", False)
    assert search.push("T") == ("ENT", False)
    assert search.flush() == ""


def test_unreadable_tokenizer_is_a_config_error_naming_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        TextTokenizer.from_directory(tmp_path)
    assert TextTokenizer.from_directory(tmp_path / "elsewhere") is None
