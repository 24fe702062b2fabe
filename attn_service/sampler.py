"""From logits to the next token.

Knows sampling settings and one number per drawn token; knows no batch history, no model and
no state: the same row gives the same token in any process and in any batch, bit for bit. What is
summed is summed as whole numbers for that reason (fixed_point.py).

First the logits are edited (logit_edits.py). The best token is then the answer where temperature
is 0. Elsewhere filters apply in this order, each to what the one before has kept (as in
transformers and SGLang; vLLM has min_p before top_k): temperature, top_k, top_p, min_p
(sampling_filters.py). What is left is drawn from.

The generator is counter-based: the uniform number of a token is a hash of
`(seed, index, position)`, so it needs no state to be carried to another process. A token is
drawn by inverting the cumulative distribution in token order.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attn_service.fixed_point import column, fixed
from attn_service.logit_edits import edit, is_edited
from attn_service.sampling_filters import drop_unlikely
from attn_service.sequence import Sampling
from attn_service.token_counts import TokenCounts

Tensor = torch.Tensor

MIN_TEMPERATURE = 1e-30  # below it float32 divides by 0, and only the best token is left anyway
NO_TOKEN = -1
"""Stands for a row whose logits are not finite: there is no honest choice."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """position: tokens before the new one, prompt included. num_output_tokens: of them, those
    that were generated. token_counts: of them all, where the settings penalise."""

    sampling: Sampling
    position: int
    num_output_tokens: int
    token_counts: TokenCounts | None = None

    def __post_init__(self) -> None:
        assert self.sampling.penalises == (self.token_counts is not None)

    @property
    def is_plain(self) -> bool:
        """Whether the model's own best token is the answer."""
        return self.sampling.temperature == 0 and not is_edited(self)


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same everywhere."""
    packed = struct.pack("<QII", seed, index, position)
    digest = hashlib.blake2b(packed, digest_size=8, person=b"epserve-sampler").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """The next token of every row of logits [num_rows, vocab_size], or NO_TOKEN. Leaves logits
    as they were; rows that are plain cost one max."""
    best, tokens = logits.max(dim=-1)  # [num_rows], [num_rows]
    others = [i for i, row in enumerate(rows) if not row.is_plain]
    if others:
        tokens[others] = _choose(logits[others], [rows[i] for i in others])
    return torch.where(best.isfinite(), tokens, NO_TOKEN).tolist()


def _choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """logits [m, vocab_size], overwritten -> tokens [m] int64, or NO_TOKEN."""
    edit(logits, rows)
    best, tokens = logits.max(dim=-1)  # [m], [m]
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        picked = logits if len(drawn) == len(rows) else logits[drawn]
        tokens[drawn] = _draw(picked, best[drawn], [rows[i] for i in drawn])
    return torch.where(best.isfinite(), tokens, NO_TOKEN)


def _draw(logits: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """logits [m, vocab_size], overwritten, and their row maxima [m] -> tokens [m] int64."""
    settings = [row.sampling for row in rows]
    temperatures = [max(s.temperature, MIN_TEMPERATURE) for s in settings]
    logits.sub_(best.unsqueeze(1)).div_(column(temperatures, logits.dtype, logits.device))
    weights = logits.float().exp_()  # [m, vocab_size], 1.0 for the best token
    drop_unlikely(weights, settings)
    sums = fixed(weights).cumsum_(dim=-1)  # [m, vocab_size] int64
    total = sums[:, -1:]
    numbers = [uniform(r.sampling.seed, r.sampling.index, r.position) for r in rows]
    draws = column(numbers, torch.float64, logits.device) * total  # [m, 1]
    # right=True skips tokens of weight 0. Rounding must not reach past the last that has any.
    reached = torch.minimum(draws.long(), total - 1)
    return torch.searchsorted(sums, reached, right=True).squeeze(1)
