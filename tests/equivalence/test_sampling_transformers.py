"""Filters and penalties keep and change what transformers' logits processors do."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from attn_service.logit_edits import edit
from attn_service.sampler import SamplingRow
from attn_service.sampling_filters import drop_unlikely
from attn_service.sequence import Sampling
from attn_service.token_counts import TokenCounts

VOCAB = 3000
ROWS = 8


def some_logits() -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(6)) * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 7},
        {"top_k": 700},
        {"top_p": 0.3},
        {"top_p": 0.95, "temperature": 3.0},
        {"min_p": 0.02},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7},
    ],
)
def test_the_filters_keep_what_transformers_keeps(changes: dict[str, float]) -> None:
    sampling = replace(Sampling(max_tokens=1, temperature=1.0), **changes)
    theirs = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        theirs.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        theirs.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        theirs.append(MinPLogitsWarper(sampling.min_p))
    logits = some_logits()
    expected = theirs(torch.zeros(ROWS, 1, dtype=torch.int64), logits.clone()).isfinite()

    best = logits.max(-1, keepdim=True).values
    weights = ((logits - best) / sampling.temperature).exp()
    drop_unlikely(weights, [sampling] * ROWS)
    assert torch.equal(weights > 0, expected)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    history = torch.randint(VOCAB, (ROWS, 50), generator=torch.Generator().manual_seed(8))
    logits = some_logits()
    expected = RepetitionPenaltyLogitsProcessor(1.3)(history, logits.clone())
    sampling = Sampling(max_tokens=64, repetition_penalty=1.3)
    rows = [
        SamplingRow(sampling, 50, 20, TokenCounts(ids[:30], ids[30:])) for ids in history.tolist()
    ]
    edit(logits, rows)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=0)
