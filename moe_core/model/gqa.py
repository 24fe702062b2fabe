"""Grouped-query attention with optional biases, QK norm and partial rotation.

Knows projections and one TP rank's share of the heads. Knows nothing of MoE.
"""

import torch
from torch import Tensor

from moe_core.config.model import ModelConfig
from moe_core.model.batch import AttentionBatch
from moe_core.model.kv_cache import LatentKv, PerHeadKv
from moe_core.model.layers import rms_norm
from moe_core.model.linear import linear
from moe_core.model.matrix_forms import Matrix
from moe_core.model.paged_attention import per_head_attention
from moe_core.model.rotary import Rotary, softmax_scale
from moe_core.model.tensor_parallel import TensorParallel
from moe_core.model.weights import GqaWeights


class GqaAttention:
    def __init__(
        self, config: ModelConfig, weights: GqaWeights, rotary: Rotary, tp: TensorParallel
    ) -> None:
        self._weights = weights
        self._rotary = rotary
        self._tp = tp
        self._eps = config.rms_norm_eps
        self._head_dim = config.head_dim
        self._rotary_dim = config.rotary_dim
        self._scale = softmax_scale(config)

    def __call__(
        self, hidden: Tensor, batch: AttentionBatch, cache: LatentKv | PerHeadKv
    ) -> Tensor:
        """hidden [n, hidden], normalised, to the attention output [n, hidden], all-reduced."""
        if not isinstance(cache, PerHeadKv):
            raise TypeError("grouped-query attention needs the per-head cache")
        w = self._weights
        queries = self._heads(hidden, w.q_proj, w.q_bias)  # [n, heads/tp, head_dim]
        keys = self._heads(hidden, w.k_proj, w.k_bias)  # [n, kv_heads/tp, head_dim]
        values = self._heads(hidden, w.v_proj, w.v_bias)
        if w.q_norm is not None and w.k_norm is not None:
            queries = rms_norm(queries, w.q_norm, self._eps)
            keys = rms_norm(keys, w.k_norm, self._eps)
        queries = self._rotate(queries, batch.positions)
        keys = self._rotate(keys, batch.positions)
        out = per_head_attention(queries, keys, values, cache, batch, self._scale)
        bias = w.o_bias if self._tp.rank == 0 else None
        return self._tp.all_reduce(linear(out.flatten(1), w.o_proj, bias))

    def _heads(self, hidden: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
        return linear(hidden, weight, bias).view(hidden.shape[0], -1, self._head_dim)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        if self._rotary_dim == self._head_dim:
            return self._rotary(x, positions)
        turned = self._rotary(x[..., : self._rotary_dim], positions)
        return torch.cat((turned, x[..., self._rotary_dim :]), dim=-1)
