"""The plain pieces of a decoder: RMSNorm, gated MLP, vocabulary-parallel embedding and head.

Knows their arithmetic and how a TP group shares it. Knows no attention and no experts.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_core.model.linear import linear
from moe_core.model.matrix_forms import Matrix
from moe_core.model.tensor_parallel import TensorParallel
from moe_core.model.weights import MlpWeights


def precise_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which norms, softmax, rotation and routing are computed: float32, or float64 in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension; rounded to x's dtype before the weight, as transformers does."""
    precise = x.to(precise_dtype(x.dtype))
    scale = torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)
    return weight * (precise * scale).to(x.dtype)


def gated_mlp(x: Tensor, weights: MlpWeights, tp: TensorParallel) -> Tensor:
    """down(silu(gate(x)) · up(x)), [n, hidden], summed over the TP group."""
    gate = functional.silu(linear(x, weights.gate_proj))  # [n, intermediate/tp]
    product = gate * linear(x, weights.up_proj)
    return tp.all_reduce(linear(product, weights.down_proj))


def vocab_parts(vocab_size: int, tp_size: int) -> tuple[int, ...]:
    """Rows of each rank: contiguous parts of ceil(vocab_size / tp_size), the last ones shorter."""
    part = -(-vocab_size // tp_size)
    return tuple(max(0, min(part, vocab_size - rank * part)) for rank in range(tp_size))


def embed(token_ids: Tensor, weight: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """token_ids [n] to [n, hidden]. Ids must be below vocab_size."""
    if tp.size == 1:
        return functional.embedding(token_ids, weight)
    start = sum(vocab_parts(vocab_size, tp.size)[: tp.rank])
    local = token_ids - start
    mine = (local >= 0) & (local < weight.shape[0])
    if weight.shape[0] == 0:
        rows = weight.new_zeros(*token_ids.shape, weight.shape[1])
    else:
        rows = functional.embedding(local.masked_fill(~mine, 0), weight)
    return tp.all_reduce(rows.masked_fill(~mine[:, None], 0))


def vocab_logits(hidden: Tensor, lm_head: Matrix, vocab_size: int, tp: TensorParallel) -> Tensor:
    """[m, hidden] to [m, vocab_size], in float32 (float64 for a float64 model)."""
    logits = linear(hidden, lm_head).to(precise_dtype(hidden.dtype))
    if tp.size == 1:
        return logits
    parts = vocab_parts(vocab_size, tp.size)
    return tp.all_gather(logits.t().contiguous(), parts).t().contiguous()
