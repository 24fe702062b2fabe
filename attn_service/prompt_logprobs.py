"""What the model thought of the tokens of prompts, for the slices of a step that ask.

Knows the last layer's rows, the head that makes logits of them, and which tokens follow. Knows no
sequences and no layers. What is told of a token, and of which logits, is logprobs.py's.

The logits of a long prompt would need gigabytes, so they are made and forgotten piece by piece.
Which rows are in a piece follows from the plan alone: the head is a collective of an attention TP
group, and its ranks must call it alike.
"""

from collections.abc import Callable, Sequence

import torch

from attn_service.logprobs import logprobs_of
from attn_service.sequence import AskedLogprobs, TokenLogprobs

Tensor = torch.Tensor

LOGITS_BYTES = 32 * 2**20  # of one piece; what is made of it takes a few times as much


def tell(
    rows: Tensor, asked: Sequence[AskedLogprobs], head: Callable[[Tensor], Tensor], vocab_size: int
) -> list[tuple[TokenLogprobs, ...]]:
    """rows [n, hidden_size]: those of each of `asked` in turn, one for each of its tokens. `head`
    takes [m, hidden_size] to logits [m, vocab_size]."""
    token_ids = [token for each in asked for token in each.token_ids]
    counts = [each.num_top for each in asked for _ in each.token_ids]
    size = max(1, LOGITS_BYTES // (vocab_size * torch.float32.itemsize))
    told: list[TokenLogprobs] = []
    for first in range(0, len(token_ids), size):
        piece = slice(first, first + size)
        told += logprobs_of(head(rows[piece]).float(), counts[piece], token_ids[piece])
    all_told = iter(told)
    return [tuple(next(all_told) for _ in each.token_ids) for each in asked]
