"""From logits to the next token.

Knows sampling settings and one number per drawn token; knows no batch history, no model and
no state: the same row gives the same token in any process, on any device and in any batch.

The generator is counter-based: the uniform number of a token is a hash of
`(seed, index, position)`, so it needs no state to be carried to another process. A token is
drawn by inverting the cumulative distribution in token order, in float64.

Filters apply in this order, each to what the one before has kept: temperature, top_k, top_p
(the smallest set of most likely tokens whose probability reaches top_p), min_p (a share of
the most likely token's probability).
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attn_service.sequence import Sampling

Tensor = torch.Tensor

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
        tokens[drawn] = _draw(logits[drawn], [rows[i] for i in drawn])
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


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """logits [m, vocab_size] -> tokens [m] int64."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    settings = [row.sampling for row in rows]
    scaled = logits.double() / column([s.temperature for s in settings])  # [m, vocab_size]
    probs = scaled.softmax(dim=-1)
    filtered = [i for i, s in enumerate(settings) if s.top_k > 0 or s.top_p < 1 or s.min_p > 0]
    if filtered:
        probs[filtered] = _filter(probs[filtered], [settings[i] for i in filtered])
    cumulative = probs.cumsum(dim=-1)
    draws = column([uniform(r.sampling.seed, r.sampling.index, r.position) for r in rows])
    # right=True skips tokens of probability 0. Rounding in u · total must not reach past the
    # last token that has any probability.
    tokens = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    last = (cumulative < cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(tokens, last).squeeze(1)


def _filter(probs: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Zeroes what top_k, top_p and min_p cut off; rows are not normalised again."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=probs.device).unsqueeze(1)

    vocab_size = probs.shape[-1]
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)  # [m, vocab_size]
    ranks = torch.arange(vocab_size, device=probs.device)  # [vocab_size]
    ordered = ordered * (ranks < column([s.top_k or vocab_size for s in settings]))
    before = ordered.cumsum(dim=-1) - ordered  # probability of the more likely tokens
    total = ordered.sum(dim=-1, keepdim=True)
    # top_p of 1 is off, whatever rounding makes of the sums.
    top_p = column([s.top_p if s.top_p < 1 else torch.inf for s in settings])
    keep = (before < top_p * total) & (
        ordered >= column([s.min_p for s in settings]) * ordered[:, :1]
    )
    return torch.zeros_like(probs).scatter(-1, order, ordered * keep)
