"""top_k, top_p and min_p for a whole batch: the smallest weight that each row's filters keep.

Each filter takes what the one before has kept: top_k the k likeliest tokens, top_p the fewest
likeliest whose probabilities reach top_p, min_p those that reach this share of the likeliest's
probability. A cut is a weight and not a number of tokens, so tokens that are exactly as likely
stay or go together.

Knows weights and settings; nothing of drawing. Few tokens decide as a rule, so ever more are
ordered until all rows are settled, and only those that are not yet are ordered again. Sums are
whole numbers, so a row's cut is the same wherever this began and whoever shares its batch.
"""

from collections.abc import Sequence

import torch

from attn_service.fixed_point import column, fixed
from attn_service.sequence import Sampling

Tensor = torch.Tensor

FIRST_ORDERED = 64
GROWTH = 8


def drop_unlikely(weights: Tensor, settings: Sequence[Sampling]) -> None:
    """Set to 0, in place, what the filters of each row do not keep: weights [m, vocab_size]
    float32, 1.0 for the likeliest of each row."""
    cuts = column([s.min_p for s in settings], weights.dtype, weights.device)  # [m, 1]
    ordered = [i for i, s in enumerate(settings) if s.top_p < 1 or 0 < s.top_k < weights.shape[1]]
    if ordered:
        found = _cuts(weights[ordered], [settings[i] for i in ordered])
        cuts[ordered] = torch.maximum(cuts[ordered], found)
    if ordered or any(s.min_p for s in settings):
        weights.mul_(weights >= cuts)


def _cuts(weights: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The smallest weight [m, 1] that top_k and top_p keep."""
    cuts, settled = _cuts_within(weights, settings, FIRST_ORDERED)
    count = FIRST_ORDERED
    while unsettled := (~settled).squeeze(1).nonzero().squeeze(1).tolist():
        count *= GROWTH
        rest = [settings[i] for i in unsettled]
        cuts[unsettled], settled[unsettled] = _cuts_within(weights[unsettled], rest, count)
    return cuts


def _cuts_within(
    weights: Tensor, settings: Sequence[Sampling], count: int
) -> tuple[Tensor, Tensor]:
    """What top_k and top_p keep, as far as the `count` likeliest tokens tell: the cuts [m, 1]
    and which of them are final [m, 1] bool; all are when count reaches the vocabulary's size."""
    vocab_size, device = weights.shape[1], weights.device
    count = min(count, vocab_size)
    top_k = [s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in settings]
    limit = column(top_k, torch.int64, device)  # [m, 1]
    ordered = weights.topk(count).values  # [m, count], descending
    sums = fixed(ordered).cumsum(dim=-1)  # [m, count] int64
    last = limit.clamp(max=count) - 1
    total = sums.gather(1, last)
    if count < vocab_size and vocab_size in top_k:
        whole = fixed(weights).sum(dim=-1, keepdim=True)
        total = torch.where(limit == vocab_size, whole, total)
    top_p = column([s.top_p for s in settings], torch.float64, device)
    # Rounding must not ask for more than there is.
    wanted = torch.minimum((top_p * total).ceil().long(), total)
    reached = torch.searchsorted(sums, wanted)  # the first whose sum is enough
    cuts = ordered.gather(1, torch.minimum(reached, last))
    return cuts, (limit <= count) | ((limit == vocab_size) & (reached < count))
