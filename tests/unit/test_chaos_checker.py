"""What the checker says of streams that are not as they must be."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from epserve.chaos.checker import Completion, Gathered, Outcome, StreamChecker, Verdict
from epserve.generate_messages import Output, Usage

TOKENS = (5, 6, 7, 8)
EXPECTED = (Completion(TOKENS, "abcd", "length", Usage(3, 4)),)


def output(tokens: Sequence[int], text: str = "", reason: str = "", index: int = 0) -> Output:
    usage = Usage(3, 4, cached_tokens=2) if reason else None
    return Output("r", index, tuple(tokens), text, reason, usage)


def verdict(
    *outputs: Output, expected: tuple[Completion, ...] = EXPECTED, end: bool = True
) -> Verdict | None:
    checker = StreamChecker("r", expected)
    for each in outputs:
        found = checker.push(each)
        if found is not None:
            return found
    return checker.end() if end else None


def test_the_same_tokens_in_other_pieces_are_exact():
    assert verdict(output([5], "a"), output([6, 7], "b"), output([8], "cd", "length")) == Verdict(
        Outcome.EXACT
    )


def test_choices_may_come_interleaved():
    both = (*EXPECTED, replace(EXPECTED[0], token_ids=(1, 2), text="xy", usage=Usage(3, 4)))
    interleaved = [
        output([5], "a"),
        output([1], "x", index=1),
        output([6, 7, 8], "bcd", "length"),
        output([2], "y", "length", index=1),
    ]
    assert verdict(*interleaved, expected=both) == Verdict(Outcome.EXACT)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([5, 9], "token 1: 9 came, 6 was due"),
        ([5, 6, 6], "token 2: 6 came, 7 was due, as if token 1 had come twice"),
        ([5, 7], "token 1: 7 came, 6 was due, as if token 1 were missing"),
        ([5, 6, 7, 8, 9], "token 4: 9 came after the last that was due"),
    ],
)
def test_the_first_wrong_token_is_named_as_soon_as_it_comes(tokens: list[int], words: str):
    found = verdict(output(tokens[:1], "a"), output(tokens[1:]), end=False)
    assert found == Verdict(Outcome.WRONG, f"choice 0, {words}")


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (output([7, 8], "cd", "stop"), "finish_reason 'stop' instead of 'length'"),
        (output([7, 8], "cx", "length"), "text 'abcx' instead of 'abcd'"),
        (replace(output([7, 8], "cd", "length"), usage=Usage(3, 5)), "usage "),
        (replace(output([7, 8], "cd", "length"), request_id="other"), "request 'other'"),
        (replace(output([7, 8], "cd", "length"), index=1), "choice 1 came"),
    ],
)
def test_the_right_tokens_with_anything_else_wrong_are_wrong(last: Output, words: str):
    found = verdict(output([5, 6], "ab"), last)
    assert found is not None
    assert found.outcome is Outcome.WRONG
    assert words in found.detail


def test_an_output_after_the_end_is_wrong():
    found = verdict(output(TOKENS, "abcd", "length"), output([], "", "length"))
    assert found == Verdict(Outcome.WRONG, "choice 0: an output came after its finish_reason")


def test_a_finish_reason_before_the_last_token_is_a_truncation():
    found = verdict(output([5, 6], "ab", "length"))
    assert found is not None
    assert found.outcome is Outcome.TRUNCATED
    assert "after 2 of 4 tokens" in found.detail


def test_a_stream_that_ends_without_a_finish_reason_is_truncated():
    found = verdict(output(TOKENS, "abcd"))
    assert found is not None
    assert found.outcome is Outcome.TRUNCATED


def test_only_exact_results_and_explicit_errors_keep_the_invariant():
    assert [outcome for outcome in Outcome if not Verdict(outcome).breaks] == [
        Outcome.EXACT,
        Outcome.ERROR,
    ]


def test_a_result_is_known_once_every_choice_has_ended():
    gathered = Gathered(2)
    gathered.push(output([5], "a", "length"))
    assert gathered.completions() is None
    gathered.push(output([6], "b", "stop", index=1))
    assert gathered.completions() == (
        Completion((5,), "a", "length", Usage(3, 4, 2)),
        Completion((6,), "b", "stop", Usage(3, 4, 2)),
    )
