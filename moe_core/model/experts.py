"""The routed experts' arithmetic: a loop that is plainly right, and the grouped form that runs.

Both compute `partial[t] = Σ_c topk_weights[t, c] · expert(local_ids[t, c])(hidden[t])` with
`expert(x) = w2 · (silu(gate · x) ⊙ (up · x))`, products in the model's dtype, the sum in fp32
(fp64 for float64). Knows local experts only: physical ids, ranks and processes are mapped
before. The shared expert is one more local id, after the last routed one.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moe_core.model.linear import linear_each
from moe_core.model.matrix_forms import Matrix
from moe_core.model.weights import ExpertLayerWeights

NO_EXPERT = -1
# Of experts computed together: with more, the products themselves are what takes time.
MAX_RUN_ROWS = 512


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of values of `dtype` are kept in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def run_experts(
    weights: ExpertLayerWeights, hidden: Tensor, local_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """Weighted partial sums, [num_tokens, hidden_size] in hidden's dtype.

    hidden: [num_tokens, hidden_size]. local_ids: [num_tokens, num_columns] int, NO_EXPERT where
    nothing is to be done, num_local_experts for the shared expert. topk_weights: [num_tokens,
    num_columns] float. Raises ValueError for a local id that is not held.
    """
    num_experts = len(weights.w13)
    total = hidden.new_zeros(hidden.shape, dtype=accumulation_dtype(hidden.dtype))
    tokens, columns = (local_ids != NO_EXPERT).nonzero(as_tuple=True)  # [num_pairs] each
    if tokens.shape[0] == 0:
        return total.to(hidden.dtype)
    experts, order = local_ids[tokens, columns].sort(stable=True)
    tokens, columns = tokens[order], columns[order]
    counts: list[int] = torch.bincount(experts, minlength=num_experts + 1).tolist()
    held = num_experts + (weights.shared is not None)
    if any(counts[held:]):
        raise ValueError(f"local ids up to {experts[-1].item()} of {num_experts} local experts")
    rows = hidden[tokens]  # [num_pairs, hidden_size]
    outputs = _run_grouped(weights, rows, counts, total.dtype)  # [num_pairs, hidden_size]
    scale = topk_weights[tokens, columns].to(total.dtype)
    total.index_add_(0, tokens, outputs.mul_(scale[:, None]))
    return total.to(hidden.dtype)


def _run_grouped(
    weights: ExpertLayerWeights, rows: Tensor, counts: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Outputs of `rows` [num_pairs, hidden_size], which are ordered by expert, in `dtype`."""
    outputs = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    num_experts = len(weights.w13)
    start = 0
    for run in _runs(counts[:num_experts]):
        sizes = [counts[expert] for expert in run]
        part = slice(start, start := start + sum(sizes))
        outputs[part] = _run_routed(weights, run, torch.split(rows[part], sizes))
    if start < len(rows):
        outputs[start:] = _run_shared(weights, rows[start:])
    return outputs


def _runs(counts: Sequence[int]) -> Iterator[list[int]]:
    """The experts that have rows, in order, as many at a time as have MAX_RUN_ROWS together."""
    run: list[int] = []
    num_rows = 0
    for expert, count in enumerate(counts):
        if run and num_rows + count > MAX_RUN_ROWS:
            yield run
            run, num_rows = [], 0
        if count:
            run.append(expert)
            num_rows += count
    if run:
        yield run


def _run_routed(
    weights: ExpertLayerWeights, experts: Sequence[int], parts: Sequence[Tensor]
) -> Tensor:
    """Each expert over its part [n_i, hidden_size], to [Σ n_i, hidden_size]."""
    w13 = [_held(weights.w13[expert], expert) for expert in experts]
    w2 = [_held(weights.w2[expert], expert) for expert in experts]
    gate, up = linear_each(parts, w13).chunk(2, dim=-1)
    products = functional.silu(gate).mul_(up)  # [Σ n_i, moe_intermediate/etp]
    return linear_each(torch.split(products, [len(part) for part in parts]), w2)


def _held(matrix: Matrix | None, expert: int) -> Matrix:
    if matrix is None:
        raise ValueError(f"local id {expert} is not held")
    return matrix


def _run_shared(weights: ExpertLayerWeights, rows: Tensor) -> Tensor:
    """The shared expert over `rows` [num_rows, hidden_size]."""
    shared = weights.shared
    if shared is None:
        raise ValueError(f"local id {len(weights.w13)} of {len(weights.w13)} local experts")
    gate = linear_each([rows], [shared.gate_proj])
    up = linear_each([rows], [shared.up_proj])
    return linear_each([functional.silu(gate).mul_(up)], [shared.down_proj])


def run_experts_by_loop(
    weights: ExpertLayerWeights, hidden: Tensor, local_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """`run_experts`, one token and one column at a time: the reference for tests."""
    total = hidden.new_zeros(hidden.shape, dtype=accumulation_dtype(hidden.dtype))
    for token, experts in enumerate(local_ids.tolist()):
        for column, expert in enumerate(experts):
            if expert != NO_EXPERT:
                row = hidden[token : token + 1]
                if expert < len(weights.w13):
                    output = _run_routed(weights, [expert], [row])[0]
                else:
                    output = _run_shared(weights, row)[0]
                scale = topk_weights[token, column].to(total.dtype)
                total[token] += scale * output.to(total.dtype)
    return total.to(hidden.dtype)
