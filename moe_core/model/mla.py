"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), over either cache.

Knows the projections and one TP rank's share of the heads. With the latent cache, the absorbed form
moves kv_b_proj into the query and the output, so that no key or value of a head is ever built; the
expanded form builds them of the whole sequence, which is cheaper for many queries. A sequence with
one new token is absorbed, one with several takes the form with fewer multiplications. With the
per-head cache every new token is expanded once. The results are the same.
"""

import torch
from torch import Tensor

from moe_core.config.model import MlaConfig, ModelConfig
from moe_core.model.batch import AttentionBatch
from moe_core.model.kv_cache import LatentKv, PerHeadKv, gather_valid, write_slots
from moe_core.model.layers import rms_norm
from moe_core.model.linear import activation_dtype, linear
from moe_core.model.matrix_forms import values_of
from moe_core.model.paged_attention import (
    all_rows,
    decode_attention,
    per_head_attention,
    prefill_attention,
)
from moe_core.model.rotary import Rotary, softmax_scale
from moe_core.model.tensor_parallel import TensorParallel
from moe_core.model.weights import MlaWeights

# The published code builds its two inner norms without passing rms_norm_eps.
_LATENT_NORM_EPS = 1e-6


class MlaAttention:
    def __init__(
        self,
        config: ModelConfig,
        mla: MlaConfig,
        weights: MlaWeights,
        rotary: Rotary,
        tp: TensorParallel,
    ) -> None:
        self._mla = mla
        self._weights = weights
        self._rotary = rotary
        self._tp = tp
        self._scale = softmax_scale(config)
        per_head = (-1, mla.qk_nope_head_dim + mla.v_head_dim, mla.kv_lora_rank)
        # Products of one row a head, which only plain matrices compute.
        wide = activation_dtype(weights.kv_a_layernorm.dtype, weights.kv_a_layernorm.device)
        kv_b = values_of(weights.kv_b_proj).to(wide).view(per_head)
        self._key_up = _laid_out(kv_b[:, : mla.qk_nope_head_dim])  # [heads/tp, nope, kv_lora_rank]
        self._value_up = _laid_out(kv_b[:, mla.qk_nope_head_dim :])  # [heads/tp, v, kv_lora_rank]

    def __call__(
        self, hidden: Tensor, batch: AttentionBatch, cache: LatentKv | PerHeadKv
    ) -> Tensor:
        """hidden [n, hidden], normalised, to the attention output [n, hidden], all-reduced."""
        queries = self._queries(hidden, batch.positions)  # [n, heads/tp, nope + rope]
        latent = self._latents(hidden, batch.positions)  # [n, kv_lora_rank + rope]
        if isinstance(cache, LatentKv):
            latent = latent.to(cache.latent.dtype)  # as it will be read
            out = self._over_latents(queries, latent, batch, cache)
        else:
            keys, values = self._expand(latent)
            out = per_head_attention(queries, keys, values, cache, batch, self._scale)
        bias = self._weights.o_proj_bias if self._tp.rank == 0 else None
        return self._tp.all_reduce(linear(out.flatten(1), self._weights.o_proj, bias))

    def _queries(self, hidden: Tensor, positions: Tensor) -> Tensor:
        w, mla = self._weights, self._mla
        if w.q_proj is not None:
            flat = linear(hidden, w.q_proj)
        elif w.q_a_proj is not None and w.q_a_layernorm is not None and w.q_b_proj is not None:
            compressed = linear(hidden, w.q_a_proj, w.q_a_proj_bias)
            compressed = rms_norm(compressed, w.q_a_layernorm, _LATENT_NORM_EPS)
            flat = linear(compressed, w.q_b_proj)
        else:
            raise ValueError("MLA weights need q_proj or q_a_proj, q_a_layernorm and q_b_proj")
        heads = flat.view(hidden.shape[0], -1, mla.qk_head_dim)
        turned = self._rotary(heads[..., mla.qk_nope_head_dim :], positions)
        return torch.cat((heads[..., : mla.qk_nope_head_dim], turned), dim=-1)

    def _latents(self, hidden: Tensor, positions: Tensor) -> Tensor:
        w, mla = self._weights, self._mla
        both = linear(hidden, w.kv_a_proj_with_mqa, w.kv_a_proj_bias)
        latent = rms_norm(both[:, : mla.kv_lora_rank], w.kv_a_layernorm, _LATENT_NORM_EPS)
        # One rotated key for all heads.
        rope = self._rotary(both[:, None, mla.kv_lora_rank :], positions)[:, 0]
        return torch.cat((latent, rope), dim=-1)

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent [t, kv_lora_rank + rope] to keys [t, heads/tp, nope + rope] and values
        [t, heads/tp, v]."""
        mla = self._mla
        both = linear(latent[:, : mla.kv_lora_rank], self._weights.kv_b_proj)
        both = both.view(latent.shape[0], -1, mla.qk_nope_head_dim + mla.v_head_dim)
        nope, values = both[..., : mla.qk_nope_head_dim], both[..., mla.qk_nope_head_dim :]
        shared = latent[:, None, mla.kv_lora_rank :].expand(-1, nope.shape[1], -1)
        return torch.cat((nope, shared), dim=-1), values

    def _over_latents(
        self, queries: Tensor, latent: Tensor, batch: AttentionBatch, cache: LatentKv
    ) -> Tensor:
        write_slots(cache.latent, batch.slot_mapping, latent)
        out = queries.new_empty(*queries.shape[:2], self._mla.v_head_dim)
        decodes = batch.decodes
        if decodes is not None:
            chosen = queries if decodes.rows is None else queries[decodes.rows]
            past = gather_valid(cache.latent, decodes.block_tables, decodes.mask)
            result = self._absorbed(chosen, past, decodes.mask)
            if decodes.rows is None:
                return result
            out.index_copy_(0, decodes.rows, result)
        for part in batch.prefills:
            rows = slice(part.start, part.end)
            past = all_rows(cache.latent, latent, part)  # [t, kv_lora_rank + rope]
            if absorbing_is_cheaper(self._mla, part.num_new, part.seq_len):
                out[rows] = self._absorbed_prefill(queries[rows], past)
            else:
                keys, values = self._expand(past)
                out[rows] = prefill_attention(queries[rows], keys, values, self._scale)
        return out

    def _absorbed(self, queries: Tensor, past: Tensor, mask: Tensor) -> Tensor:
        """queries [b, heads/tp, nope + rope], past [b, t, latent_dim] to [b, heads/tp, v]."""
        absorbed = self._absorb(queries)
        # One key head, whose leading part is the value; converted here, so that it is once.
        shared = past.to(absorbed.dtype).unsqueeze(2)
        values = shared[..., : self._mla.kv_lora_rank]
        mixed = decode_attention(absorbed, shared, values, mask, self._scale)
        return self._values_of(mixed).to(queries.dtype)

    def _absorbed_prefill(self, queries: Tensor, past: Tensor) -> Tensor:
        """queries [s, heads/tp, nope + rope], past [t, latent_dim] to [s, heads/tp, v]."""
        absorbed = self._absorb(queries)
        shared = past.to(absorbed.dtype).unsqueeze(1)
        values = shared[..., : self._mla.kv_lora_rank]
        mixed = prefill_attention(absorbed, shared, values, self._scale)
        return self._values_of(mixed).to(queries.dtype)

    def _absorb(self, queries: Tensor) -> Tensor:
        """[n, heads/tp, nope + rope] to [n, heads/tp, kv_lora_rank + rope]."""
        nope_dim = self._mla.qk_nope_head_dim
        nope = queries[..., :nope_dim].to(self._key_up.dtype)
        content = torch.bmm(_laid_out(nope.transpose(0, 1)), self._key_up).transpose(0, 1)
        return torch.cat((content, queries[..., nope_dim:].to(content.dtype)), dim=-1)

    def _values_of(self, mixed: Tensor) -> Tensor:
        """[n, heads/tp, kv_lora_rank] to [n, heads/tp, v]."""
        heads = _laid_out(mixed.transpose(0, 1))  # [heads/tp, n, kv_lora_rank]
        return torch.bmm(heads, self._value_up.transpose(1, 2)).transpose(0, 1)


def _laid_out(x: Tensor) -> Tensor:
    """Contiguous on a CPU, whose `bmm` else copies what it is given at every call."""
    return x.contiguous() if x.device.type == "cpu" else x


def absorbing_is_cheaper(mla: MlaConfig, num_new: int, seq_len: int) -> bool:
    """Whether the last `num_new` of a sequence's `seq_len` tokens take fewer multiplications a head
    absorbed than expanded.

    Each form multiplies by kv_b_proj once a row: of the new tokens where it is absorbed, of all
    where they are expanded. A pair of query and key then costs the width of key and value, which
    is that of the latents, or of one head. DeepSeek-V3 absorbs up to about 170 new tokens after a
    long context, and never without one.
    """
    latent, rope = mla.kv_lora_rank, mla.qk_rope_head_dim
    head = mla.qk_nope_head_dim + mla.v_head_dim
    absorbed = num_new * latent * head + num_new * seq_len * (2 * latent + rope)
    expanded = seq_len * latent * head + num_new * seq_len * (head + rope)
    return absorbed < expanded
