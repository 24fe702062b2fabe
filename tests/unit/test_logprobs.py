"""What is told about chosen tokens: log_softmax of the raw logits, ranks and the likeliest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_service.logprobs import token_logprobs
from attn_service.sequence import TokenLogprobs


def told(logits: torch.Tensor, wanted: list[int | None], tokens: list[int]) -> list[TokenLogprobs]:
    answers = token_logprobs(logits, wanted, tokens)
    assert all(answer is not None for answer in answers)
    return [answer for answer in answers if answer is not None]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    rows=st.lists(
        st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=9, max_size=9),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_logprobs_ranks_and_the_likeliest_are_the_plain_ones(
    rows: list[list[float]], data: st.DataObject
) -> None:
    """Quarters, so that there are many equals."""
    wanted = data.draw(st.lists(st.integers(0, 12), min_size=len(rows), max_size=len(rows)))
    tokens = data.draw(st.lists(st.integers(0, 8), min_size=len(rows), max_size=len(rows)))
    answers = told(torch.tensor(rows), list(wanted), tokens)
    for row, count, token, answer in zip(rows, wanted, tokens, answers, strict=True):
        expected = torch.tensor(row).log_softmax(-1)
        order = sorted(range(9), key=lambda other: (-row[other], other))[:count]
        assert answer.token_id == token
        assert answer.logprob == pytest.approx(expected[token].item(), abs=2e-6)
        assert answer.rank == 1 + sum(logit > row[token] for logit in row)
        assert answer.top_token_ids == tuple(order)
        assert answer.top_logprobs == pytest.approx(expected[order].tolist(), abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_is_told_the_same_alone_in_any_batch_and_on_any_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(12, 40_000, generator=generator, dtype=dtype) * 3
    logits[:, 100:5000] = logits[:, :1]  # equals at the edge of what is told
    wanted = [0, 1, 5, 20] * 3
    tokens = [*logits[:6].argmax(-1).tolist(), *range(6)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [told(logits[i : i + 1], [wanted[i]], [tokens[i]])[0] for i in range(12)]
    finally:
        torch.set_num_threads(threads)
    assert told(logits, list(wanted), tokens) == alone
    order = [7, 3, 11]
    assert told(logits[order], [wanted[i] for i in order], [tokens[i] for i in order]) == [
        alone[i] for i in order
    ]


def test_float64_logits_are_told_in_float32() -> None:
    logits = torch.randn(1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (answer,) = told(logits, [3], [7])
    expected = logits.float().log_softmax(-1)[0, 7].item()
    assert answer.logprob == pytest.approx(expected, abs=2e-6)


def test_only_rows_that_ask_and_have_a_token_are_told() -> None:
    logits = torch.zeros(4, 8)
    logits[1] = torch.nan
    answers = token_logprobs(logits, [None, 2, 0, None], [1, -1, 3, 2])
    assert [answer is not None for answer in answers] == [False, False, True, False]
    assert token_logprobs(logits, [None] * 4, [0, 0, 0, 0]) == [None] * 4
    assert token_logprobs(torch.zeros(0, 8), [], []) == []


def test_a_likely_token_among_unlikely_ones_has_a_logprob_near_zero() -> None:
    logits = torch.full((1, 130_000), -30.0)
    logits[0, 5] = 30.0
    best, other = told(logits.repeat(2, 1), [0, 1], [5, 6])
    assert best.logprob == 0.0
    assert other.logprob == pytest.approx(-60.0)
    assert (best.rank, other.rank) == (1, 2)
    assert other.top_token_ids == (5,)
