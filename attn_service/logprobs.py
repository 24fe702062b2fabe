"""What the model itself thought of the tokens that follow, for rows that ask.

log_softmax in float32 of the logits as the model gave them: before logit_bias, penalties,
min_tokens, temperature and filters (vLLM v1's "raw_logprobs").

Knows logits and the tokens that follow; nothing of how they were chosen. The sum in the denominator
is one of whole numbers and equals are told in the order of their ids, so what a row is told does
not depend on the batch it was in.
"""

from collections.abc import Sequence

import torch

from attn_service.fixed_point import ONE, fixed
from attn_service.sequence import TokenLogprobs

Tensor = torch.Tensor


def token_logprobs(
    logits: Tensor, wanted: Sequence[int | None], token_ids: Sequence[int]
) -> list[TokenLogprobs | None]:
    """logits [m, vocab_size]; per row how many of the likeliest tokens to tell, or None for
    nothing, and the chosen token, where one less than 0 stands for none."""
    told: list[TokenLogprobs | None] = [None] * len(token_ids)
    asking = [i for i, count in enumerate(wanted) if count is not None and token_ids[i] >= 0]
    if asking:
        counts = [wanted[i] or 0 for i in asking]
        answers = logprobs_of(logits[asking].float(), counts, [token_ids[i] for i in asking])
        for i, answer in zip(asking, answers, strict=True):
            told[i] = answer
    return told


def logprobs_of(
    logits: Tensor, counts: Sequence[int], token_ids: Sequence[int]
) -> list[TokenLogprobs]:
    """logits [m, vocab_size] float32; of each row the token that follows, and how many of the
    likeliest to tell beside it. Logits that are not finite give logprobs that are not."""
    best = logits.max(dim=-1, keepdim=True).values  # [m, 1]
    whole = fixed((logits - best).exp_()).sum(dim=-1, keepdim=True)
    log_total = best.double() + (whole.double() / ONE).log()  # [m, 1]
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1))
    ranks = (logits > chosen).sum(dim=-1) + 1  # [m]
    top_ids, top_logits = _likeliest(logits, max(counts))  # [m, n]
    logprobs = (torch.cat([chosen, top_logits], dim=1).double() - log_total).float().tolist()
    rows = zip(token_ids, counts, ranks.tolist(), top_ids.tolist(), logprobs, strict=True)
    return [
        TokenLogprobs(token, values[0], rank, tuple(ids[:n]), tuple(values[1 : n + 1]))
        for token, n, rank, ids, values in rows
    ]


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and logits [m, count] of the likeliest tokens, equals in the order of their ids, which
    topk does not promise."""
    count = min(count, logits.shape[1])
    if count == 0:
        return logits.new_empty(len(logits), 0, dtype=torch.int64), logits[:, :0]
    least = logits.topk(count).values[:, -1:]  # [m, 1]
    row_ids, token_ids = (logits >= least).nonzero(as_tuple=True)  # [e], by row, then by id
    values = logits[row_ids, token_ids]  # [e]
    by_value = values.argsort(descending=True, stable=True)
    order = by_value[row_ids[by_value].argsort(stable=True)]
    sizes = row_ids.bincount(minlength=len(logits))  # [m], at least count each
    first = sizes.cumsum(0) - sizes
    picked = order[first.unsqueeze(1) + torch.arange(count, device=logits.device)]  # [m, count]
    return token_ids[picked], values[picked]
