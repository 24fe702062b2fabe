from dataclasses import replace

import pytest
import torch

from attn_service.sampler import NO_TOKEN, SamplingRow, sample, uniform
from attn_service.sequence import Sampling

VOCAB = 12
DRAWS = 4000
# Five standard deviations of a share that is estimated from DRAWS draws.
TOLERANCE = 5 * 0.5 / DRAWS**0.5


def logits_row() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def row(position: int = 5, num_output_tokens: int = 0, **settings: object) -> SamplingRow:
    return SamplingRow(replace(Sampling(max_tokens=8), **settings), position, num_output_tokens)


def shares(logits: torch.Tensor, **settings: object) -> torch.Tensor:
    """How often each token is drawn, over DRAWS positions."""
    rows = [row(position, **settings) for position in range(DRAWS)]
    tokens = sample(logits.expand(DRAWS, -1), rows)
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB).double() / DRAWS


def plain_distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The filters, one token at a time, in the order that the sampler documents."""
    probs = torch.softmax(logits.double() / sampling.temperature, dim=-1).tolist()
    kept = sorted(range(VOCAB), key=lambda token: -probs[token])
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    total, reached, nucleus = sum(probs[t] for t in kept), 0.0, []
    for token in kept:
        if sampling.top_p < 1 and reached >= sampling.top_p * total:
            break
        nucleus.append(token)
        reached += probs[token]
    kept = [t for t in nucleus if probs[t] >= sampling.min_p * probs[nucleus[0]]]
    total = sum(probs[t] for t in kept)
    return torch.tensor([probs[t] / total if t in kept else 0.0 for t in range(VOCAB)])


def test_temperature_zero_takes_the_best_token() -> None:
    logits = torch.stack([logits_row(), -logits_row()])
    assert sample(logits, [row(), row()]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "settings",
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
def test_tokens_are_drawn_from_the_plain_formulas_distribution(
    settings: dict[str, float],
) -> None:
    logits = logits_row()
    expected = plain_distribution(logits, replace(Sampling(max_tokens=8), **settings))
    drawn = shares(logits, **settings)
    assert (drawn - expected).abs().max() < TOLERANCE
    assert drawn[expected == 0].sum() == 0


def test_a_row_draws_the_same_token_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(6, 500, generator=generator)
    rows = [
        row(3, seed=1, temperature=1.0),
        row(4, seed=2),
        row(5, seed=3, temperature=0.7, top_p=0.8),
        row(6, seed=4, temperature=1.3, top_k=20),
        row(7, seed=5, temperature=1.0, min_p=0.05),
        row(8, seed=6, temperature=1.0, min_tokens=3, stop_token_ids=frozenset({7, 9})),
    ]
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(6)]
    assert sample(logits, rows) == alone
    order = [4, 0, 5, 2, 1, 3]
    assert sample(logits[order], [rows[i] for i in order]) == [alone[i] for i in order]


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


def test_stop_tokens_are_not_drawn_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 4] = 50.0
    stops = frozenset({4})
    early = row(num_output_tokens=1, min_tokens=2, stop_token_ids=stops)
    late = row(num_output_tokens=2, min_tokens=2, stop_token_ids=stops)
    assert sample(logits, [early]) != [4]
    assert sample(logits, [late]) == [4]
    assert logits[0, 4] == 50.0  # the caller's logits are left as they were


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_token(temperature: float) -> None:
    logits = logits_row().repeat(3, 1)
    logits[1, 2] = torch.nan
    logits[2, 2] = torch.inf
    tokens = sample(logits, [row(temperature=temperature)] * 3)
    assert tokens[0] != NO_TOKEN
    assert tokens[1:] == [NO_TOKEN, NO_TOKEN]


def test_a_nucleus_of_many_tokens_is_found_whole() -> None:
    """Flat logits: the most likely 90% are far more tokens than are ordered at first."""
    vocab = 1000
    logits = torch.linspace(1.0, 0.0, vocab)
    probs = logits.double().softmax(-1)
    size = int((probs.cumsum(0) < 0.9).sum()) + 1
    rows = [row(position, temperature=1.0, top_p=0.9) for position in range(DRAWS)]
    tokens = sample(logits.expand(DRAWS, -1), rows)
    assert size - 10 < max(tokens) < size


def test_extreme_temperatures_keep_to_the_vocabulary() -> None:
    logits = logits_row().unsqueeze(0)
    for temperature in (1e-30, 1e-300):
        assert sample(logits, [row(temperature=temperature)]) == [int(logits.argmax())]
    assert 0 <= sample(logits, [row(temperature=1e30)])[0] < VOCAB
