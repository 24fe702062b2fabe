"""The batched sampler against formulas written out row by row, and against itself alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attn_service.sampler import NO_TOKEN, SamplingRow, sample, uniform
from attn_service.sequence import Sampling, SequenceRequest
from attn_service.sequence import Sequence as EngineSequence
from support import plain_sampler

VOCAB = 12
DRAWS = 4000
# Five standard deviations of a share that is estimated from DRAWS draws.
TOLERANCE = 5 * 0.5 / DRAWS**0.5
# Weights are float32: a decision closer than this may go either way.
MARGIN = 1e-5
PLAIN = Sampling(max_tokens=64)


def logits_row() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def row(position: int = 5, num_output_tokens: int = 0, **changes: object) -> SamplingRow:
    return SamplingRow(replace(PLAIN, **changes), position, num_output_tokens)


def row_of(sampling: Sampling, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> SamplingRow:
    """The row that the engine makes for such a sequence."""
    request = SequenceRequest("s", tuple(prompt_ids), sampling, output_ids=tuple(output_ids))
    sequence = EngineSequence(request)
    return SamplingRow(
        sampling, sequence.num_tokens, sequence.num_output_tokens, sequence.token_counts
    )


@dataclass(frozen=True)
class Case:
    logits: list[float]
    sampling: Sampling
    prompt_ids: list[int]
    output_ids: list[int]

    @property
    def row(self) -> SamplingRow:
        return row_of(self.sampling, self.prompt_ids, self.output_ids)

    @property
    def token(self) -> tuple[int, float]:
        return plain_sampler.next_token(
            self.logits, self.sampling, self.prompt_ids, self.output_ids
        )


TOKENS = st.integers(0, VOCAB - 1)


def numbers(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(least, most, width=32)


def or_off(off: float, values: st.SearchStrategy[float]) -> st.SearchStrategy[float]:
    return st.just(off) | values


SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.just(64),
    temperature=or_off(0.0, numbers(0.125, 4.0)),
    top_p=or_off(1.0, numbers(0.125, 1.0)),
    top_k=st.integers(0, VOCAB + 2),
    min_p=or_off(0.0, numbers(0.0, 1.0)),
    seed=st.integers(0, 2**64 - 1),
    index=st.integers(0, 63),
    stop_token_ids=st.frozensets(TOKENS, max_size=4),
    min_tokens=st.integers(0, 6),
    repetition_penalty=or_off(1.0, numbers(0.25, 4.0)),
    presence_penalty=or_off(0.0, numbers(-2.0, 2.0)),
    frequency_penalty=or_off(0.0, numbers(-2.0, 2.0)),
    logit_bias=st.dictionaries(TOKENS, numbers(-100.0, 100.0), max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
)
CASES = st.builds(
    Case,
    logits=st.lists(numbers(-8.0, 8.0), min_size=VOCAB, max_size=VOCAB),
    sampling=SAMPLINGS,
    prompt_ids=st.lists(TOKENS, min_size=1, max_size=8),
    output_ids=st.lists(TOKENS, max_size=8),
)


@settings(deadline=None, max_examples=250, derandomize=True)
@given(st.lists(CASES, min_size=1, max_size=5))
def test_every_row_of_a_batch_gets_the_plain_formulas_token(cases: list[Case]) -> None:
    tokens = sample(torch.tensor([case.logits for case in cases]), [case.row for case in cases])
    expected = [case.token for case in cases]
    for token, (wanted, margin) in zip(tokens, expected, strict=True):
        assert token == wanted or margin < MARGIN


@settings(deadline=None, max_examples=300, derandomize=True)
@given(CASES)
def test_in_float64_the_margin_is_not_needed_for_the_best_token(case: Case) -> None:
    greedy = replace(case, sampling=replace(case.sampling, temperature=0.0))
    wanted, margin = greedy.token
    assume(margin > 1e-12)
    assert sample(torch.tensor([case.logits], dtype=torch.float64), [greedy.row]) == [wanted]


def mixed_rows() -> list[SamplingRow]:
    """One row of each kind, and one of all kinds together."""
    history = ([3, 3, 7, 11], [5, 7, 5, 400, 5])
    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.3}
    settings: list[dict[str, object]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 1.3, "top_k": 300, "top_p": 0.99},
        {"temperature": 5.0, "top_p": 0.999},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "min_tokens": 30, "stop_token_ids": frozenset({7, 9})},
        {"logit_bias": ((3, 5.0), (44, -100.0))},
        penalties,
        {"temperature": 0.9, "top_p": 0.95, "logit_bias": ((5, 2.0),), **penalties},
    ]
    return [
        row_of(replace(PLAIN, seed=seed, **changes), *history)
        for seed, changes in enumerate(settings)
    ]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("vocab_size", [500, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(deadline=None, max_examples=15, derandomize=True)
@given(seed=st.integers(0, 2**32), picked=st.permutations(range(11)), size=st.integers(1, 11))
def test_a_row_draws_the_same_token_alone_in_any_batch_and_on_any_threads(
    vocab_size: int, dtype: torch.dtype, seed: int, picked: list[int], size: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [replace(each, position=seed % 1000) for each in mixed_rows()]
    logits = torch.randn(len(rows), vocab_size, generator=generator, dtype=dtype) * 2
    with threads(1):
        alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    picked = picked[:size]
    for count in (1, 2):
        with threads(count):
            together = sample(logits[picked], [rows[i] for i in picked])
        assert together == [alone[i] for i in picked]


def shares(logits: torch.Tensor, **changes: object) -> torch.Tensor:
    """How often each token is drawn, over DRAWS positions."""
    rows = [row(position, **changes) for position in range(DRAWS)]
    tokens = sample(logits.expand(DRAWS, -1), rows)
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB).double() / DRAWS


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 50, "top_p": 1.0},
        {"temperature": 1.0, "top_p": 1e-6},
    ],
)
def test_tokens_are_drawn_from_the_plain_formulas_distribution(changes: dict[str, float]) -> None:
    logits = logits_row()
    expected = plain_sampler.kept(logits.tolist(), replace(PLAIN, **changes)).probabilities
    drawn = shares(logits, **changes)
    assert (drawn - torch.tensor(expected)).abs().max() < TOLERANCE
    assert drawn[torch.tensor(expected) == 0].sum() == 0


def test_the_choices_of_a_request_differ_and_each_repeats() -> None:
    logits = logits_row().expand(16, -1)
    rows = [row(temperature=2.0, seed=9, index=index) for index in range(16)]
    tokens = sample(logits, rows)
    assert len(set(tokens)) > 4
    assert sample(logits[:1], rows[5:6]) == tokens[5:6]


def test_temperature_zero_takes_the_first_of_the_best_tokens() -> None:
    logits = torch.stack([logits_row(), -logits_row(), torch.zeros(VOCAB)])
    assert sample(logits, [row()] * 3) == [*logits[:2].argmax(-1).tolist(), 0]


def test_the_generator_depends_on_seed_index_and_position_only() -> None:
    known = uniform(42, 1, 7)
    assert known == uniform(42, 1, 7)
    assert len({known, uniform(43, 1, 7), uniform(42, 2, 7), uniform(42, 1, 8)}) == 4
    # Written down once, so that another version or machine continues the same text.
    assert known == 0.8477332094141344


def test_the_generator_is_uniform() -> None:
    draws = torch.tensor([uniform(0, 0, position) for position in range(DRAWS)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert (draws.histc(10, 0, 1) / DRAWS - 0.1).abs().max() < TOLERANCE


def test_the_callers_logits_are_left_as_they_were() -> None:
    logits = torch.randn(11, 500, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    sample(logits, mixed_rows())
    assert torch.equal(logits, before)


def test_stop_tokens_are_not_drawn_before_min_tokens_whatever_their_bias() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 4] = 50.0
    changes = {"min_tokens": 2, "stop_token_ids": frozenset({4}), "logit_bias": ((4, 100.0),)}
    assert sample(logits, [row(num_output_tokens=1, **changes)]) != [4]
    assert sample(logits, [row(num_output_tokens=2, **changes)]) == [4]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.5, "top_k": 3},
        {"min_tokens": 9, "stop_token_ids": frozenset({2})},
        {"logit_bias": ((2, -100.0),)},
    ],
)
def test_a_row_that_is_not_finite_has_no_token(changes: dict[str, object]) -> None:
    """Not even where the logit that is wrong could not have been chosen."""
    logits = logits_row().repeat(3, 1)
    logits[1, 2] = torch.nan
    logits[2, 2] = torch.inf
    tokens = sample(logits, [row(**changes)] * 3)
    assert tokens[0] != NO_TOKEN
    assert tokens[1:] == [NO_TOKEN, NO_TOKEN]


@pytest.mark.parametrize("penalty", [1e-30, 1e30])
def test_an_extreme_repetition_penalty_still_chooses_a_token(penalty: float) -> None:
    logits = torch.tensor([[1e20, -1e20, 1.0, 0.5]])
    sampling = replace(PLAIN, repetition_penalty=penalty, temperature=1.0)
    assert sample(logits, [row_of(sampling, [0, 1], [1])]) == [0 if penalty < 1 else 2]


def test_a_nucleus_of_many_tokens_is_found_whole() -> None:
    """Flat logits: the most likely 90% are far more tokens than are ordered at first."""
    vocab = 1000
    logits = torch.linspace(1.0, 0.0, vocab)
    probs = logits.double().softmax(-1)
    size = int((probs.cumsum(0) < 0.9).sum()) + 1
    rows = [row(position, temperature=1.0, top_p=0.9) for position in range(DRAWS)]
    tokens = sample(logits.expand(DRAWS, -1), rows)
    assert size - 10 < max(tokens) < size


def test_tokens_that_are_equally_likely_stay_or_go_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for changes in ({"top_k": 2}, {"top_p": 0.5}):
        rows = [row(position, temperature=1.0, **changes) for position in range(300)]
        assert set(sample(logits.expand(300, -1), rows)) == {0, 1, 2, 3}


def test_extreme_temperatures_keep_to_the_vocabulary() -> None:
    logits = logits_row().unsqueeze(0)
    for temperature in (1e-30, 1e-300):
        assert sample(logits, [row(temperature=temperature)]) == [int(logits.argmax())]
    assert 0 <= sample(logits, [row(temperature=1e30)])[0] < VOCAB
