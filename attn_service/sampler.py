"""From logits to the next token.

Knows sampling settings and one number per drawn token; knows no batch history, no model and
no state: the same row gives the same token in any process, on any device and in any batch.

The generator is counter-based: the uniform number of a token is a hash of
`(seed, index, position)`, so it needs no state to be carried to another process. A token is
drawn by inverting the cumulative distribution in token order, in float64.

Filters apply in this order, each to what the one before has kept: temperature, top_k, top_p
(the smallest set of most likely tokens whose probability reaches top_p), min_p (a share of
the most likely token's probability). Each is a smallest probability that stays, so tokens that
are exactly as likely stay or go together.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attn_service.sequence import Sampling

Tensor = torch.Tensor

MIN_TEMPERATURE = 1e-30  # below it float32 divides by 0, and only the best token is left anyway
FIRST_ORDERED = 64
NO_TOKEN = -1
"""Stands for a row whose logits are not finite: there is no honest choice."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """position: tokens before the new one, prompt included. num_output_tokens: of them, those
    that were generated."""

    sampling: Sampling
    position: int
    num_output_tokens: int


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same everywhere."""
    packed = struct.pack("<QII", seed, index, position)
    digest = hashlib.blake2b(packed, digest_size=8, person=b"epserve-sampler").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """The next token of every row of logits [num_rows, vocab_size], or NO_TOKEN."""
    logits = _without_early_stops(logits, rows)  # [num_rows, vocab_size]
    best, tokens = logits.max(dim=-1)  # [num_rows], [num_rows]
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], best[drawn], [rows[i] for i in drawn])
    return torch.where(best.isfinite(), tokens, NO_TOKEN).tolist()


def _without_early_stops(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """−inf for the stop tokens of rows that are short of min_tokens."""
    masked = [
        (i, token)
        for i, row in enumerate(rows)
        if row.num_output_tokens < row.sampling.min_tokens
        for token in row.sampling.stop_token_ids
    ]
    if not masked:
        return logits
    row_ids, token_ids = zip(*masked, strict=True)
    logits = logits.clone()
    logits[list(row_ids), list(token_ids)] = -torch.inf
    return logits


def _draw(logits: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """logits [m, vocab_size] and their row maxima [m] -> tokens [m] int64."""
    settings = [row.sampling for row in rows]
    temperatures = [max(s.temperature, MIN_TEMPERATURE) for s in settings]
    scaled = (logits - best[:, None]) / _column(temperatures, logits)  # [m, vocab_size], <= 0
    weights = scaled.float().exp()  # of the best token 1
    cuts = [_cut(row, s) for row, s in zip(weights, settings, strict=True)]
    weights = weights.masked_fill(weights < _column(cuts, weights), 0.0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    draws = _column([uniform(r.sampling.seed, r.sampling.index, r.position) for r in rows], total)
    # right=True skips tokens of weight 0. Rounding in u · total must not reach past the last
    # token that has any weight.
    tokens = torch.searchsorted(cumulative, draws * total, right=True)
    last = (cumulative < total).sum(dim=-1, keepdim=True)
    return torch.minimum(tokens, last).squeeze(1)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _cut(weights: Tensor, sampling: Sampling) -> float:
    """The smallest of one row's weights [vocab_size] that all its filters keep."""
    top_k = sampling.top_k if 0 < sampling.top_k < weights.shape[0] else 0
    if sampling.top_p < 1:
        return max(sampling.min_p, _nucleus_cut(weights, sampling.top_p, top_k))
    if top_k:
        return max(sampling.min_p, weights.topk(top_k).values[-1].item())
    return sampling.min_p


def _nucleus_cut(weights: Tensor, top_p: float, top_k: int) -> float:
    """The weight with which the most likely tokens' sum reaches top_p of the total.

    Few tokens reach it as a rule, so ever more are ordered until they do; what has been ordered
    before stays as it was, so the outcome does not depend on where this began.
    """
    limit = top_k or weights.shape[0]
    kept = weights.topk(top_k).values if top_k else weights
    wanted = top_p * kept.sum(dtype=torch.float64)
    count = min(FIRST_ORDERED, limit)
    while True:
        ordered = weights.topk(count).values  # [count], descending
        cumulative = ordered.cumsum(dim=0, dtype=torch.float64)
        if count == limit or cumulative[-1] >= wanted:
            reached = torch.searchsorted(cumulative, wanted).item()
            return ordered[min(int(reached), count - 1)].item()
        count = min(8 * count, limit)
