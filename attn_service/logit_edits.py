"""logit_bias, penalties and min_tokens: what changes logits before anything is chosen.

The order is vLLM v1's: the bias, the repetition penalty, the frequency penalty, the presence
penalty. Stop tokens are masked at the end here and first there, with the same outcome.

* repetition_penalty r (Keskar et al. 2019, arXiv:1909.05858; transformers, vLLM): a token of the
  prompt or the output has its logit divided by r where it is positive, multiplied elsewhere.
* frequency_penalty f, presence_penalty p (OpenAI): a token that was generated c > 0 times loses
  f · c + p.

Knows the logits of rows and what each asks for; nothing of probabilities. Only the logits of the
tokens concerned are touched, all rows' at once: the cost depends on those, not on the vocabulary.
"""

from array import array
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from attn_service.sequence import Sampling
from attn_service.token_counts import TokenCounts

Tensor = torch.Tensor


class EditedRow(Protocol):
    """token_counts are there where the settings penalise."""

    @property
    def sampling(self) -> Sampling: ...

    @property
    def num_output_tokens(self) -> int: ...

    @property
    def token_counts(self) -> TokenCounts | None: ...


def is_edited(row: EditedRow) -> bool:
    """Whether `edit` changes anything of this row."""
    return bool(row.sampling.logit_bias or row.sampling.penalises or _masked(row))


def edit(logits: Tensor, rows: Sequence[EditedRow]) -> None:
    """Change logits [len(rows), vocab_size] in place."""
    _add_biases(logits, rows)
    _penalise(logits, rows)
    _mask_stops(logits, rows)


def _add_biases(logits: Tensor, rows: Sequence[EditedRow]) -> None:
    """A row has at most one bias for a token, so no place is written twice."""
    biases = [(i, *bias) for i, row in enumerate(rows) for bias in row.sampling.logit_bias]
    if biases:
        row_ids, token_ids, values = zip(*biases, strict=True)
        added = torch.tensor(values, dtype=logits.dtype, device=logits.device)  # [e]
        logits[_on_device(logits, torch.tensor(row_ids), torch.tensor(token_ids))] += added


def _penalise(logits: Tensor, rows: Sequence[EditedRow]) -> None:
    counted = [
        (i, row.sampling, row.token_counts)
        for i, row in enumerate(rows)
        if row.token_counts is not None
    ]
    if not counted:
        return
    sizes = torch.tensor([len(counts.ids) for _, _, counts in counted])
    settings = torch.tensor(
        [(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for _, s, _ in counted],
        dtype=logits.dtype,
    )
    settings = settings.repeat_interleave(sizes, dim=0).to(logits.device)  # [e, 3]
    row_ids = torch.tensor([i for i, _, _ in counted]).repeat_interleave(sizes)  # [e]
    token_ids = _joined([counts.ids for _, _, counts in counted])  # [e]
    places = _on_device(logits, row_ids, token_ids)
    times = _joined([counts.counts for _, _, counts in counted]).to(logits)  # [e]
    logits[places] = _penalised(logits[places], times, settings)


def _penalised(values: Tensor, times: Tensor, settings: Tensor) -> Tensor:
    """values [e], generated `times` [e] times; settings [e, 3] as in `_penalise` -> [e]."""
    repetition, frequency, presence = settings.unbind(dim=1)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * times - presence * (times > 0)
    most = torch.finfo(values.dtype).max
    return values.clamp(-most, most)  # an extreme repetition_penalty makes no infinities


def _mask_stops(logits: Tensor, rows: Sequence[EditedRow]) -> None:
    masked = [(i, token) for i, row in enumerate(rows) for token in _masked(row)]
    if masked:
        row_ids, token_ids = zip(*masked, strict=True)
        logits[_on_device(logits, torch.tensor(row_ids), torch.tensor(token_ids))] = -torch.inf


def _masked(row: EditedRow) -> frozenset[int]:
    """The stop tokens that may not come yet."""
    early = row.num_output_tokens < row.sampling.min_tokens
    return row.sampling.stop_token_ids if early else frozenset()


def _joined(parts: Sequence["array[int]"]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _on_device(logits: Tensor, row_ids: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """An index of logits, [e] and [e]."""
    return row_ids.to(logits.device), token_ids.to(logits.device)
