"""What a client is sent of one choice's tokens: text, stop strings, usage, and not twice."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.request_stream import Delta
from gateway.requests import Chunk, Sequence, TokenLogprobs, Usage
from gateway.sequence_output import SequenceOutput
from gateway.tokenizer import TextTokenizer
from support.fallback_tokenizer import fallback_tokenizer
from support.naive_stop import naive
from support.words import word_tokenizer


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


def shown_by(tokenizer: TextTokenizer, stop: tuple[str, ...], deltas: list[Delta]) -> list[Chunk]:
    output = SequenceOutput(sequence(stop=stop), tokenizer)
    chunks = []
    for delta in deltas:
        chunks.append(output.push(delta))
        if chunks[-1].finish_reason:
            break
    return chunks


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    token_ids=st.lists(st.sampled_from(range(10)), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 11), max_size=4),
    stop=st.lists(st.text(" ab日x", min_size=1, max_size=4), max_size=3),
)
def test_text_and_usage_do_not_depend_on_how_steps_group_the_tokens(
    token_ids: list[int], cuts: list[int], stop: list[str]
) -> None:
    tokenizer = fallback_tokenizer()
    edges = sorted({0, len(token_ids), *(cut for cut in cuts if cut < len(token_ids))})
    parts = [tuple(token_ids[a:b]) for a, b in pairwise(edges)]
    deltas = [Delta(part) for part in parts[:-1]] + [Delta(parts[-1], "length")]
    chunks = shown_by(tokenizer, tuple(stop), deltas)
    single = [Delta((t,)) for t in token_ids[:-1]] + [Delta((token_ids[-1],), "length")]
    one_by_one = shown_by(tokenizer, tuple(stop), single)
    text = "".join(chunk.text for chunk in chunks)
    assert text == "".join(chunk.text for chunk in one_by_one)
    assert (text, chunks[-1].finish_reason == "stop") == naive(tokenizer.decode(token_ids), stop)
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert tokens == [token for chunk in one_by_one for token in chunk.token_ids]
    assert chunks[-1].usage == one_by_one[-1].usage == Usage(1, len(tokens))


def test_a_stop_string_that_begins_before_min_tokens_is_found_when_it_ends_after() -> None:
    output = SequenceOutput(sequence(stop=("ax wab",), min_tokens=2), word_tokenizer())
    assert output.push(Delta((2,))).text == "wa"
    last = output.push(Delta((3,)))
    assert (last.text, last.finish_reason, last.token_ids) == ("", "stop", (3,))


def test_the_text_of_a_stop_token_is_not_shown_and_the_token_is_counted() -> None:
    output = SequenceOutput(sequence(), word_tokenizer())
    chunk = output.push(Delta((2, 3), "stop"))
    assert (chunk.text, chunk.token_ids, chunk.finish_reason) == ("waax", (2, 3), "stop")
    assert chunk.usage == Usage(1, 2)


def test_logprobs_are_cut_with_the_tokens_and_cached_tokens_come_with_the_usage() -> None:
    told = tuple(TokenLogprobs(token, -0.5, 1) for token in (2, 3, 4))
    output = SequenceOutput(sequence(stop=("bx",)), word_tokenizer())
    assert output.push(Delta((2,), "", told[:1], cached_tokens=1)).logprobs == told[:1]
    chunk = output.push(Delta((3, 4), "", told[1:]))
    assert (chunk.token_ids, chunk.logprobs) == ((3,), told[1:2])
    assert chunk.usage == Usage(1, 2, cached_tokens=1)


def test_what_is_told_of_single_tokens_comes_with_them() -> None:
    told = tuple(TokenLogprobs(token, -0.5, 1) for token in (2, 3, 4))
    output = SequenceOutput(sequence(), word_tokenizer())
    first = output.push(Delta((3,), "", told[1:2], cached_tokens=1, prompt_logprobs=told[:1]))
    assert (first.logprobs, first.prompt_logprobs, first.usage) == (told[1:2], told[:1], None)
    last = output.push(Delta((4,), "length", told[2:]))
    assert (last.logprobs, last.prompt_logprobs) == (told[2:], ())
    assert last.usage == Usage(1, 2, cached_tokens=1)


def test_held_back_text_comes_with_the_last_chunk() -> None:
    output = SequenceOutput(sequence(stop=("waax never",)), word_tokenizer())
    assert output.push(Delta((2,))).text == ""
    assert output.push(Delta((), "length")).text == "waax"


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    chunk = SequenceOutput(sequence(), None).push(Delta((2, 3), "length"))
    assert (chunk.text, chunk.token_ids) == ("", (2, 3))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    token_ids=st.lists(st.sampled_from(range(10)), min_size=1, max_size=12),
    had=st.integers(0, 12),
    cut=st.integers(0, 12),
    stop=st.lists(st.text(" ab日x", min_size=1, max_size=4), max_size=3),
    reason=st.sampled_from(["length", "stop"]),
)
def test_a_client_that_has_some_tokens_is_sent_exactly_the_rest(
    token_ids: list[int], had: int, cut: int, stop: list[str], reason: str
) -> None:
    """However the tokens come again, in two deltas here, the last of which has the end."""
    cut %= len(token_ids)
    tokenizer = fallback_tokenizer()
    single = [Delta((t,)) for t in token_ids[:-1]] + [Delta((token_ids[-1],), reason)]
    whole = shown_by(tokenizer, tuple(stop), single)
    before, after = whole[:had], whole[had:]
    output = SequenceOutput(sequence(stop=tuple(stop)), tokenizer, skip=len(before))
    rest = [output.push(Delta(tuple(token_ids[:cut])))]
    if not rest[-1].finish_reason:
        rest.append(output.push(Delta(tuple(token_ids[cut:]), reason)))
    assert "".join(chunk.text for chunk in rest) == "".join(chunk.text for chunk in after)
    assert [t for chunk in rest for t in chunk.token_ids] == [
        t for chunk in after for t in chunk.token_ids
    ]
    assert (rest[-1].finish_reason, rest[-1].usage) == (whole[-1].finish_reason, whole[-1].usage)
